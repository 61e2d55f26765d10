"""How often a model has read given sequences of tokens, wherever in an instance they stood.

A rolling hash finds candidates, and the tokens themselves decide.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from olmo_jax.study.reading import Reading

# 20 s of one core in instances of 2,048 tokens, 90 s in instances of 256.
MOST_TOKENS = 1 << 28
_ROWS = 1 << 21  # tokens at once
_BITS = 20  # of a hash, by which most of what is sought nowhere is passed over
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_FACTOR, -1, 1 << 64)


def can_count(reading: Reading) -> bool:
    """Whether `count` takes a minute or so, rather than hours."""
    return len(reading.read) * reading.dataset.tokens_per_instance <= MOST_TOKENS


def count(
    reading: Reading,
    sequences: Sequence[tuple[int, ...]],
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """For each sequence (all of one length, at least 1, none twice), how often it was in what was
    read: an instance that was read twice counts twice, and so do two places in one instance.

    progress(done, of how many) counts instances.
    """
    found = [0] * len(sequences)
    if not sequences:
        return found
    dataset = reading.dataset
    times = Counter(dataset.instance_id(n) for n in reading.read)
    ids = sorted(times)  # as they lie in the files
    seek = _Seek(np.array(sequences, np.int64), dataset.tokens_per_instance)
    rows = max(1, _ROWS // dataset.tokens_per_instance)
    for start in range(0, len(ids), rows):
        some = ids[start : start + rows]
        instances = [dataset.row(i) for i in some]
        lengths_B = np.array([np.count_nonzero(row.segment_ids_T) for row in instances])
        for b, which in seek(np.stack([row.tokens_T for row in instances]), lengths_B):
            found[which] += times[some[b]]
        if progress:
            progress(start + len(some), len(ids))
    return found


class _Seek:
    """Finds sequences_NW in rows of T tokens.

    The hash of tokens x_0 … x_{W-1} is the sum of x_i F^i modulo 2^64: the difference of two prefix
    sums of the row, divided by a power of F, which is odd.
    """

    def __init__(self, sequences_NW: np.ndarray, T: int):
        self.W = sequences_NW.shape[1]
        self.sequences_NW = sequences_NW
        length = max(T, self.W)
        self.power_T = _powers(_FACTOR, length)
        self.inverse_T = _powers(_INVERSE, length)
        hash_N = (_mixed(sequences_NW) * self.power_T[: self.W]).sum(axis=1, dtype=np.uint64)
        order = np.argsort(hash_N)
        self.order, self.hash_N = order, hash_N[order]
        self.maybe = np.zeros(1 << _BITS, np.bool_)
        self.maybe[hash_N >> np.uint64(64 - _BITS)] = True

    def __call__(self, tokens_BT: np.ndarray, lengths_B: np.ndarray) -> list[tuple[int, int]]:
        """(row, which sequence) for each place; lengths_B: tokens without padding."""
        B, T = tokens_BT.shape
        if T < self.W:
            return []
        sums_BT = np.zeros((B, T + 1), np.uint64)
        np.cumsum(_mixed(tokens_BT) * self.power_T[:T], axis=1, out=sums_BT[:, 1:])
        hash_BT = (sums_BT[:, self.W :] - sums_BT[:, : -self.W]) * self.inverse_T[: T - self.W + 1]
        found = []
        b_M, t_M = np.nonzero(self.maybe[hash_BT >> np.uint64(64 - _BITS)])
        first_M = np.searchsorted(self.hash_N, hash_BT[b_M, t_M], "left")
        last_M = np.searchsorted(self.hash_N, hash_BT[b_M, t_M], "right")
        for b, t, first, last in zip(b_M, t_M, first_M, last_M, strict=True):
            for which in self.order[first:last]:  # several, should two hashes ever be equal
                inside = t + self.W <= lengths_B[b]
                same = np.array_equal(tokens_BT[b, t : t + self.W], self.sequences_NW[which])
                if inside and same:
                    found.append((int(b), int(which)))
        return found


def _powers(factor: int, length: int) -> np.ndarray:
    """factor^0 … factor^(length-1) modulo 2^64."""
    out = np.full(length, factor, np.uint64)
    out[0] = 1
    return np.multiply.accumulate(out)


def _mixed(tokens: np.ndarray) -> np.ndarray:
    """Small numbers spread over 64 bits; equal tokens stay equal."""
    x = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(31))
