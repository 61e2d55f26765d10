"""How often items are there more than once: exact, by hashes of 64 bits on disk, in bounded memory.

Each file's hashes are written in sorted runs; parts of the hashes' range are then compared one by
one. At 10^9 items 0.03 pairs of different ones are expected to have the same hash.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from olmo_jax.curate.executor import Advance
from olmo_jax.curate.histogram import Histogram
from olmo_jax.files import write_bytes

RUN = 1 << 20
PART = 1 << 22
"""Hashes that are compared at once, 32 MB and as much again to sort them."""


class Runs:
    """Writes hashes to a file as runs of sorted uint64, and keeps how long each is."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left: list[np.ndarray] = []
        self.lengths: list[int] = []

    def add(self, hashes: np.ndarray) -> None:
        self._left.append(hashes)
        if sum(map(len, self._left)) >= RUN:
            self.close()

    def close(self) -> None:
        """Writes the last run."""
        if self._left and len(run := np.sort(np.concatenate(self._left))):
            self._file.write(run.tobytes())
            self.lengths.append(len(run))
        self._left = []


def part_bits(total: int) -> int:
    """Into how many parts the hashes' range is cut, as a power of two."""
    return max(0, (total - 1) // PART).bit_length()


def compare_part(
    files: Sequence[tuple[str, Sequence[int]]], part: int, bits: int, out: str, advance: Advance
) -> None:
    """Writes how many items of a part of the range are there how often, as a Histogram's content.
    `files` are those of Runs with their lengths."""
    low, high = part << (64 - bits), (part + 1) << (64 - bits)
    found = [np.zeros(0, np.uint64)]
    for path, lengths in files:
        start = 0
        hashes = np.memmap(path, np.uint64, "r") if lengths else found[0]
        for length in lengths:
            run = hashes[start : start + length]
            first = int(np.searchsorted(run, np.uint64(low)))
            last = length if high >> 64 else int(np.searchsorted(run, np.uint64(high)))
            found.append(np.array(run[first:last]))
            start += length
    ordered = np.sort(np.concatenate(found))
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    times = np.diff(np.flatnonzero(is_first), append=len(ordered))
    sizes, counts = np.unique(times, return_counts=True)
    histogram = Histogram()
    histogram.add_counts(dict(zip(sizes.tolist(), counts.tolist(), strict=True)))
    write_bytes(Path(out), json.dumps(histogram.content()).encode())
    advance(0, ordered.nbytes)
