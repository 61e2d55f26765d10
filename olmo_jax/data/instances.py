"""Instances: which tokens of which files make up the i-th row of a source, in file order.

An instance is a list of pieces, a piece a stretch of one file; order and batches are elsewhere.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from olmo_jax.data.token_files import TokenFile
from olmo_jax.errors import UserError


class Piece(NamedTuple):
    """Tokens [start, end) of one file."""

    file: TokenFile
    start: int
    end: int


class Instances(Protocol):
    """A source cut into instances; `pieces(i)` has at most sequence_length tokens in all."""

    def __len__(self) -> int: ...

    def pieces(self, i: int) -> list[Piece]: ...

    def cuts(self, k: int) -> np.ndarray:
        """The inverse: instance, start, end of all pieces of file k, in the file's order, (n, 3)
        int64."""
        ...


class FixedInstances:
    """Each file cut every `sequence_length` tokens on its own, its tail dropped (OLMo's FSL).

    With `max_target_sequence_length` a file counts only as far as a multiple of that, so that runs
    at several lengths see the same tokens.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        sequence_length: int,
        max_target_sequence_length: int | None = None,
    ):
        unit = max_target_sequence_length or sequence_length
        counts = [f.size // unit * (unit // sequence_length) for f in files]
        if not any(counts):
            longest = max(files, key=lambda f: f.size)
            raise UserError(
                f"an instance needs {unit} tokens, but the longest of {len(files)} token files, "
                f"{longest.path}, holds {longest.size}; shorten sequence_length or give more text"
            )
        self._files = tuple(files)
        self._length = sequence_length
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def pieces(self, i: int) -> list[Piece]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        start = (i - (int(self._ends[k - 1]) if k else 0)) * self._length
        return [Piece(self._files[k], start, start + self._length)]

    def cuts(self, k: int) -> np.ndarray:
        ids_N = np.arange(self._ends[k - 1] if k else 0, self._ends[k])
        starts_N = (ids_N - (ids_N[0] if len(ids_N) else 0)) * self._length
        return np.stack([ids_N, starts_N, starts_N + self._length], axis=1)
