"""The most frequent of any number of items, in bounded memory, and how far each count may be off.

Counting with a known error, as in lossy counting (Manku and Motwani, 2002) and the merging of such
summaries (Agarwal et al., 2012). Which items a corpus has is `stat`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CAPACITY = 8192
"""Items kept: some 1.5 MB of a file's summary, and enough that the first hundreds are exact."""
_PRIME = np.uint64(0x9E3779B97F4A7C15)


class Frequent:
    """Items with counts. One that was kept was seen at least `count` and at most `count + missed`
    times; one that is not there at most `bound` times."""

    def __init__(self) -> None:
        self.entries: dict[str, list[int]] = {}
        """Item to [count, missed]."""
        self.bound = 0
        self.total = 0

    def add(self, counts: Mapping[str, Sequence[int]], total: int, bound: int = 0) -> None:
        """Adds other [count, missed]s, whose items that are not there were seen at most `bound`
        times. The outcome depends on the order of calls alone."""
        for item, entry in self.entries.items() if bound else ():
            if item not in counts:
                entry[1] += bound
        for item, (count, missed) in counts.items():
            entry = self.entries.setdefault(item, [0, self.bound])
            entry[0] += count
            entry[1] += missed
        self.total += total
        self.bound += bound
        if len(self.entries) > CAPACITY:
            ranked = self._ranked()
            self.bound = max(self.bound, *(sum(entry) for _, entry in ranked[CAPACITY:]))
            self.entries = dict(ranked[:CAPACITY])

    def merge(self, content: dict[str, Any]) -> None:
        """Adds what `content` gave."""
        self.add(content["entries"], content["total"], content["bound"])

    def content(self) -> dict[str, Any]:
        """For a file."""
        return {"entries": self.entries, "total": self.total, "bound": self.bound}

    def top(self, n: int) -> dict[str, Any]:
        """The first n, equal ones by name."""
        items = [
            {"item": item, "count": count, "at_most": count + missed}
            for item, (count, missed) in self._ranked()[:n]
        ]
        return {"total": self.total, "others_at_most": self.bound, "items": items}

    def _ranked(self) -> list[tuple[str, list[int]]]:
        return sorted(self.entries.items(), key=lambda pair: (-pair[1][0], pair[0]))


def most_frequent(hash_I: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Of items by their hashes, uint64: where the most frequent ones first are, (K,), how often
    each is there, (K,), and the most that any other is. All of them, or the CAPACITY first of those
    that are there twice."""
    ordered = np.sort(hash_I)  # 8 times as fast as np.unique with its places
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_first)
    count_U = np.diff(starts, append=len(ordered))
    value_U = ordered[starts]
    bound = 0
    if len(count_U) > CAPACITY:
        rank = np.argsort(-count_U, kind="stable")[:CAPACITY]
        rank = rank[count_U[rank] > 1]
        left = np.ones(len(count_U), bool)
        left[rank] = False
        bound = int(count_U[left].max())
        rank.sort()
        count_U, value_U = count_U[rank], value_U[rank]
    if not len(value_U):
        return np.zeros(0, np.int64), count_U, bound
    at = np.minimum(np.searchsorted(value_U, hash_I), len(value_U) - 1)
    place = np.flatnonzero(value_U[at] == hash_I)[::-1]
    first_K = np.zeros(len(value_U), np.int64)
    first_K[at[place]] = place  # of equal ones the last that is written stays: the first
    return first_K, count_U, bound


def ngram_counts(
    words: Sequence[str], document_W: np.ndarray, lengths: Sequence[int]
) -> dict[int, tuple[dict[str, tuple[int, int]], int, int]]:
    """For each length n what `Frequent.add` takes of the n-grams within documents. `document_W`
    says which document a word is of. Two n-grams of 64 equal bits are one: at a million n-grams,
    once in 40 million calls."""
    table: dict[str, int] = {}
    ids_W = np.array([table.setdefault(word, len(table)) for word in words], np.int64)
    bits = np.random.default_rng(0).integers(0, 1 << 64, len(table) or 1, np.uint64)
    word_W = bits[ids_W]
    found = {}
    hash_I = np.zeros(len(words), np.uint64)
    for n in range(1, max(lengths) + 1):
        m = max(len(words) - n + 1, 0)
        hash_I = hash_I[:m] * _PRIME + word_W[n - 1 :]
        if n in lengths:
            inside = np.flatnonzero(document_W[:m] == document_W[n - 1 :])
            first_K, count_K, bound = most_frequent(hash_I[inside])
            texts = [" ".join(words[at : at + n]) for at in inside[first_K].tolist()]
            counts = {text: (count, 0) for text, count in zip(texts, count_K.tolist(), strict=True)}
            found[n] = (counts, len(inside), bound)
    return found
