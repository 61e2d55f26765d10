"""Packed instances: whole documents fitted into instances, best fit first (Ding et al. 2024).

"Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), as OLMo-core does it, except that
documents longer than an instance are cut into instance-sized pieces and no token is lost.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olmo_jax.data.fingerprint import fingerprint_files
from olmo_jax.data.index_file import index_array
from olmo_jax.data.instances import Piece
from olmo_jax.data.token_files import TokenFile
from olmo_jax.errors import UserError


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """Bin number of each item, (len(lengths),) int64; every length is in 1..capacity.

    Longest first, each item goes where it leaves the least room; among equals to the bin that has
    waited longest. Bins are numbered in the order in which they were opened.
    """
    lengths = np.asarray(lengths, np.int64)
    bins_with_room: list[deque[int]] = [deque() for _ in range(capacity)]
    rooms = 0  # bit r is set when some bin has r tokens of room: the best fit is one bit scan away
    n_bins = 0
    bin_of = np.empty(len(lengths), np.int64)
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            waiting = bins_with_room[room]
            bin_ = waiting.popleft()
            if not waiting:
                rooms &= ~(1 << room)
        else:
            room, bin_, n_bins = capacity, n_bins, n_bins + 1
        bin_of[item] = bin_
        if left := room - length:
            bins_with_room[left].append(bin_)
            rooms |= 1 << left
    return bin_of


class PackedInstances:
    """Documents of each group of `group_size` consecutive files, packed into instances.

    Each group's packing is an index file of its own, named by the group's fingerprint.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        sequence_length: int,
        group_size: int,
        eos_token_id: int | None,
        index_dir: Path,
    ):
        self._groups = [tuple(files[k : k + group_size]) for k in range(0, len(files), group_size)]
        self._length, self._eos, self._index_dir = sequence_length, eos_token_id, index_dir
        self._group_size = group_size
        self._names = []
        counts = []
        for k, group in enumerate(self._groups):
            key = fingerprint_files(group, with_documents=True)
            self._names.append(f"packed-{sequence_length}-{eos_token_id}-{key}")
            counts.append(int(self._index(k)[0]))
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def pieces(self, i: int) -> list[Piece]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        i -= int(self._ends[k - 1]) if k else 0
        index = self._index(k)
        n_instances = int(index[0])
        first, last = int(index[1 + i]), int(index[2 + i])
        rows = index[2 + n_instances :].reshape(-1, 3)[first:last]
        return [Piece(self._groups[k][f], start, end) for f, start, end in rows.tolist()]

    def cuts(self, k: int) -> np.ndarray:
        group, f = divmod(k, self._group_size)
        index = self._index(group)
        n_instances = int(index[0])
        rows = index[2 + n_instances :].reshape(-1, 3)
        ids = np.repeat(np.arange(n_instances), np.diff(index[1 : 2 + n_instances]))
        found = np.flatnonzero(rows[:, 0] == f)
        found = found[np.argsort(rows[found, 1])]
        first = int(self._ends[group - 1]) if group else 0
        return np.concatenate([first + ids[found, None], rows[found, 1:]], axis=1)

    def _index(self, k: int) -> np.ndarray:
        return index_array(self._index_dir, self._names[k], lambda: self._build(self._groups[k]))

    def _build(self, group: Sequence[TokenFile]) -> np.ndarray:
        """(n_instances, offsets of n_instances + 1, then file, start, end of each piece) int64."""
        rows = np.concatenate(
            [
                np.insert(cut(document_spans(file, self._eos), self._length), 0, f, axis=1)
                for f, file in enumerate(group)
            ]
        )
        bin_of = best_fit_decreasing(rows[:, 2] - rows[:, 1], self._length)
        # Longest first within an instance too, as they were put in.
        by_bin = np.lexsort((rows[:, 1] - rows[:, 2], bin_of))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(bin_of))])
        return np.concatenate([[len(offsets) - 1], offsets, rows[by_bin].ravel()]).astype(np.int64)


def document_spans(file: TokenFile, eos_token_id: int | None) -> np.ndarray:
    """Start and end of the file's documents, (n, 2) int64: from its .csv.gz, else from the eos.

    Tokens after the last eos count as a document. Raises UserError when there is neither.
    """
    documents = file.documents()
    if documents is not None:
        spans = np.array([d[:2] for d in documents], np.int64).reshape(-1, 2)
    elif eos_token_id is not None:
        ends = np.flatnonzero(file.tokens[:] == eos_token_id) + 1
        ends = np.union1d(ends, [file.size])
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    else:
        raise UserError(
            f"{file.path}: its documents are unknown: there is no {file.documents_path}; "
            f"set Data.eos_token_id"
        )
    spans = spans[spans[:, 1] > spans[:, 0]]
    if not len(spans):
        raise UserError(f"{file.documents_path}: lists no document")
    return spans


def cut(spans: np.ndarray, length: int) -> np.ndarray:
    """`spans` (n, 2) with those longer than `length` cut into pieces of it and a remainder."""
    n_pieces = -(-(spans[:, 1] - spans[:, 0]) // length)
    starts = np.repeat(spans[:, 0], n_pieces)
    ordinal = np.arange(len(starts)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    starts = starts + ordinal * length
    return np.stack([starts, np.minimum(starts + length, np.repeat(spans[:, 1], n_pieces))], axis=1)
