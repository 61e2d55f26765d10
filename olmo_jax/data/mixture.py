"""Mixtures: which source the n-th instance comes from, as a pure function of n and the weights.

Each source's count stays within one of its exact share at every prefix, so a mixture loses nothing
to rounding and a source of tiny weight still appears.
"""

import heapq
from decimal import Decimal
from fractions import Fraction
from math import gcd

import numpy as np

_PARTS = 1_000_000


class Mixture:
    """A periodic schedule of sources: source k fills parts[k] of every sum(parts) positions."""

    def __init__(self, weights: list[float]):
        self.parts = whole_parts(weights)
        self.period = sum(self.parts)
        self._source_of, self._count_before = _schedule(self.parts)

    def __call__(self, n: int) -> tuple[int, int]:
        """(k, j): the n-th instance is the j-th that source k gives; both counted from 0."""
        round_, m = divmod(n, self.period)
        k = int(self._source_of[m])
        return k, round_ * self.parts[k] + int(self._count_before[m])

    def counts(self, n: int) -> list[int]:
        """How many of the first n instances each source gives."""
        round_, m = divmod(n, self.period)
        part = np.bincount(self._source_of[:m], minlength=len(self.parts)).tolist()
        return [round_ * p + c for p, c in zip(self.parts, part, strict=True)]

    def positions(self, k: int, j_N: np.ndarray) -> np.ndarray:
        """The inverse of calling: which instance of all the j-th that source k gives is."""
        round_N, m_N = np.divmod(j_N, self.parts[k])
        return round_N * self.period + np.flatnonzero(self._source_of == k)[m_N]


def whole_parts(weights: list[float]) -> list[int]:
    """The weights as whole numbers in the same ratio, at least 1 each, about a million at most.

    Exact for weights of up to six decimals that sum to 1; otherwise the nearest millionth of the
    sum (largest remainder), and a smaller weight than that counts as a millionth.
    """
    exact = [Fraction(Decimal(repr(float(w)))) for w in weights]
    total = sum(exact)
    common = 1
    for w in exact:
        common = common * (w / total).denominator // gcd(common, (w / total).denominator)
    size = common if common <= _PARTS else _PARTS
    shares = [w / total * size for w in exact]
    parts = [max(1, int(s)) for s in shares]
    short = size - sum(parts)
    by_remainder = sorted(range(len(shares)), key=lambda k: int(shares[k]) - shares[k])
    for k in by_remainder[: max(0, short)]:
        parts[k] += 1
    divisor = gcd(*parts)
    return [p // divisor for p in parts]


def _schedule(parts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each position of a period, and how many it had before, (period,) each.

    Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980): no
    count is ever further than 1 - 1/(2K - 2) from its share. Item j of source k may come once its
    share exceeds j by `slack`, and must before it would exceed j + 1 by 1 - slack; the one that is
    due first goes first.
    """
    period, n_sources = sum(parts), len(parts)
    source_of = np.zeros(period, np.int32)
    count_before = np.arange(period, dtype=np.int32)
    if n_sources == 1:
        return source_of, count_before
    # Times are in units of 1 / scale of a position's share: whole numbers, so ties are exact.
    scale = 2 * n_sources - 2
    counts = [0] * n_sources
    released: list[tuple[int, int]] = []  # (due, source)
    waiting = [(-(-period // (scale * p)), k) for k, p in enumerate(parts)]  # (release, source)
    heapq.heapify(waiting)
    for m in range(period):
        while waiting and waiting[0][0] <= m + 1:
            _, k = heapq.heappop(waiting)
            due = (((counts[k] + 1) * scale - 1) * period) // (scale * parts[k])
            heapq.heappush(released, (due, k))
        _, k = heapq.heappop(released)
        source_of[m], count_before[m] = k, counts[k]
        counts[k] += 1
        release = -(-(counts[k] * scale + 1) * period // (scale * parts[k]))
        heapq.heappush(waiting, (release, k))
    return source_of, count_before
