"""How numbers are distributed, in bounded memory and the same for any order of the work."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

EXACT = 4096
"""Different values that are kept as they are; with more, all are rounded to three digits, which
moves a quantile by at most 0.5 %."""
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_BINS = 30
_LOG_FROM = 100.0  # a reach from which bins grow with the values


class Histogram:
    """Values with counts, and their exact number, sum, smallest and largest."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()
        self._is_rounded = False
        self.count = 0
        self.sum = 0.0
        self.min = math.inf
        self.max = -math.inf

    def add(self, values: Iterable[float]) -> None:
        self.add_counts(Counter(values))

    def add_counts(self, counts: Mapping[float, int]) -> None:
        """Adds values with how often each is there."""
        if counts:
            self.count += sum(counts.values())
            self.sum += math.fsum(value * n for value, n in counts.items())
            self.min, self.max = min(self.min, min(counts)), max(self.max, max(counts))
            self._take(counts)

    def merge(self, content: dict[str, Any]) -> None:
        """Adds what `content` gave."""
        if content["count"]:
            self.count += content["count"]
            self.sum += content["sum"]
            self.min, self.max = min(self.min, content["min"]), max(self.max, content["max"])
            self._is_rounded |= content["is_rounded"]
            self._take(dict(content["values"]))

    def content(self) -> dict[str, Any]:
        """For a file."""
        names = ("count", "sum", "min", "max")
        facts = {name: getattr(self, name) for name in names if self.count or name == "count"}
        return facts | {"is_rounded": self._is_rounded, "values": sorted(self._counts.items())}

    def summary(self) -> dict[str, Any]:
        """For people: mean, quantiles, and some thirty bins, whose edges are one more than their
        counts. A bin holds its lower edge; the last one the upper edge, too."""
        if not self.count:
            return {"count": 0}
        values = sorted(self._counts.items())
        quantiles, seen = {}, 0
        left = [(q, math.ceil(q * self.count)) for q in QUANTILES]
        for value, n in values:
            seen += n
            while left and seen >= left[0][1]:
                quantiles[str(left.pop(0)[0])] = min(max(value, self.min), self.max)
        edges = self._edges()
        bins, at = [0] * (len(edges) - 1), 0
        for value, n in values:
            while at < len(bins) - 1 and value >= edges[at + 1]:
                at += 1
            bins[at] += n
        return {
            "count": self.count,
            "sum": self.sum,
            "mean": self.sum / self.count,
            "min": self.min,
            "max": self.max,
            "quantiles": quantiles,
            "edges": edges,
            "counts": bins,
            "is_exact": not self._is_rounded,
        }

    def _take(self, counts: Mapping[float, int]) -> None:
        self._counts.update(counts)
        if self._is_rounded or len(self._counts) > EXACT:
            self._is_rounded = True
            rounded: Counter[float] = Counter()
            for value, n in self._counts.items():
                rounded[float(f"{value:.2e}")] += n
            self._counts = rounded

    def _edges(self) -> list[float]:
        low, high = self.min, self.max
        if low == high:
            return [low, high]
        if low >= 0 and high >= _LOG_FROM:
            # Eight a decade, and whole numbers at the beginning, where most values are counts.
            first = 0 if low < 1 else math.floor(8 * math.log10(low))
            last = math.ceil(8 * math.log10(high) + 1e-9)
            edges = [10 ** (k / 8) for k in range(first, last + 1)]
            edges = sorted({round(e) if e < 100 else float(f"{e:.3g}") for e in edges})
            return [0, *edges] if low < 1 else edges
        return [low + (high - low) * k / _BINS for k in range(_BINS + 1)]
