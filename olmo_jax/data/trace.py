"""The way back: from a training step to documents, and from a document to the steps that read it.

Steps are counted here as metrics.jsonl and the checkpoints do: the first is 1, and checkpoint N
has seen steps 1 to N. Finding a string is text_index.py's; nothing here is on the way of training.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from olmo_jax import storage
from olmo_jax.data.batch import Batch
from olmo_jax.data.dataset import DataSet, Location, Source
from olmo_jax.data.document_index import documents_are_few, documents_between, documents_named
from olmo_jax.data.packing import document_spans
from olmo_jax.data.token_files import Document, TokenFile
from olmo_jax.errors import UserError

_NEAR, _LOOKED_AT = 3, 20_000
_CHUNK = 1 << 22  # instances


@dataclass(frozen=True)
class Row:
    """A row of a step's batch. `epoch` is counted from 1, `n` and `row` from 0."""

    step: int
    row: int
    n: int
    epoch: int
    instance_id: int
    places: tuple[Location, ...]


@dataclass(frozen=True)
class Sighting:
    """Tokens [start, end) of a file, read at a step in a row, from token `at` of the row on."""

    step: int
    row: int
    n: int
    epoch: int
    instance_id: int
    start: int
    end: int
    at: int


@dataclass(frozen=True)
class Found:
    """A document, or a stretch of one, and every time that training read some of it."""

    path: str
    start: int
    end: int
    documents: tuple[Document, ...]
    sightings: tuple[Sighting, ...]

    @property
    def steps(self) -> list[int]:
        return sorted({s.step for s in self.sightings})


def digest(tokens_BT: np.ndarray) -> str:
    """16 hex digits of a batch's tokens: what a run records of each step."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tokens_BT).data)


class Trace:
    """What steps first + 1 to last of a run read.

    The run's step 1 reads what step `data_from_step` (counted from 0) of the data's order does.
    """

    def __init__(self, dataset: DataSet, last: int, first: int = 0, data_from_step: int = 0):
        self.dataset, self.first, self.last, self._ahead = dataset, first, last, data_from_step
        self.first_n, self.last_n = self.start(first + 1), self.start(last + 1)
        self._cuts_of: dict[tuple[int, int], np.ndarray] = {}

    def start(self, step: int) -> int:
        """The position in the order at which a step begins to read."""
        return self.dataset.first_n(step - 1 + self._ahead)

    def step_and_row(self, n: int) -> tuple[int, int]:
        """The step that reads position n of the order, and the row of its batch."""
        step = self.dataset.step_of(n)
        return step + 1 - self._ahead, n - self.dataset.first_n(step)

    def epoch(self, n: int) -> int:
        """How often the source of position n is gone through by then, from 1."""
        k, j = self.dataset.mixture(n) if self.dataset.mixture else (0, n)
        return j // self.dataset.sources[k].epoch_length + 1

    def batch_step(self, step: int) -> int:
        """A step's number in the data's order, counted from 0. Raises UserError for a step that is
        not among those of the run."""
        if not self.first < step <= self.last:
            raise UserError(f"step {step}: there are steps {self.first + 1} to {self.last}")
        return step - 1 + self._ahead

    def rows(self, step: int, rows: list[int] | None = None) -> list[Row]:
        """The rows of a step's global batch (None: all). Raises UserError."""
        at = self.batch_step(step)
        size, first = self.dataset.batch_size(at), self.dataset.first_n(at)
        if wrong := [row for row in rows or [] if not 0 <= row < size]:
            raise UserError(f"row {wrong[0]}: step {step} has rows 0 to {size - 1}")
        found = []
        for row in range(size) if rows is None else rows:
            instance = self.dataset.instance_id(first + row)
            places = tuple(self.dataset.where(instance))
            epoch = self.epoch(first + row)
            found.append(Row(step, row, first + row, epoch, instance, places))
        return found

    def batch(self, step: int, rows: list[int] | None = None) -> Batch:
        """These rows of the step's batch (None: all), as training was given them."""
        return self.dataset.batch(self.batch_step(step), rows)

    def document(self, name: str) -> list[Found]:
        """The documents with this id, as a rule one, and every time that they were read.

        Raises UserError when there is none, with those of a similar name.
        """
        spans, named = [], []
        for k, f, file in self._files():
            for d in documents_named(file, name):
                spans.append((k, f, d.start, d.end))
                named.append((d,))
        if not spans:
            raise UserError(self._no_document(name))
        found = self.stretches(spans)
        return [replace(one, documents=d) for one, d in zip(found, named, strict=True)]

    def stretches(self, spans: list[tuple[int, int, int, int]]) -> list[Found]:
        """For each (k, f, start, end): tokens [start, end) of file f of source k, their documents
        and every time that some of them were read."""
        sightings: list[list[Sighting]] = [[] for _ in spans]
        for k, source in enumerate(self.dataset.sources):
            pieces = [
                (i, *cut)
                for i, (of, f, start, end) in enumerate(spans)
                if of == k
                for cut in self._pieces_between(k, f, start, end)
            ]
            instances_N = np.array([instance for _, instance, _, _ in pieces], np.int64)
            for n, epoch, p in self._readings(k, instances_N):
                i, instance, start, end = pieces[p]
                _, f, first, last = spans[i]
                a, b = max(start, first), min(end, last)
                at = a - start + _offset(source, instance, source.files[f], start)
                step, row = self.step_and_row(n)
                instance += source.first_id
                sightings[i].append(Sighting(step, row, n, epoch, instance, a, b, at))
        return [
            Found(
                (file := self.dataset.sources[k].files[f]).path,
                start,
                end,
                documents_between(file, start, end),
                tuple(read),
            )
            for (k, f, start, end), read in zip(spans, sightings, strict=True)
        ]

    def seen(self) -> list[dict[str, Any]]:
        """A row for each source: instances read, tokens, epochs, and of how many documents (None if
        not known, or too many to count)."""
        few = documents_are_few([file for _, _, file in self._files()])
        rows = []
        for k, source in enumerate(self.dataset.sources):
            first, last = self._counts(self.first_n)[k], self._counts(self.last_n)[k]
            was_read = np.zeros(len(source.instances), bool)
            for epoch, start, end in _epochs(source, first, last):
                for at in range(start, end, _CHUNK):
                    ids = source.order.instances(epoch, at, min(at + _CHUNK, end))
                    was_read[ids] = True
            documents = self._count_read(k, was_read) if few else None
            rows.append(
                {
                    "source": source.name or "data",
                    "instances": last - first,
                    "tokens": (last - first) * self.dataset.tokens_per_instance,
                    "epochs": round((last - first) / source.epoch_length, 4),
                    "different_instances": int(was_read.sum()),
                    "documents": documents and documents[0],
                    "documents_in_all": documents and documents[1],
                }
            )
        return rows

    def _pieces_between(self, k: int, f: int, start: int, end: int) -> list[list[int]]:
        """(instance, start, end) of the pieces that overlap tokens [start, end) of a file."""
        if start >= end:
            return []
        cuts = self._cuts(k, f)
        low = int(np.searchsorted(cuts[:, 2], start, side="right"))
        high = int(np.searchsorted(cuts[:, 1], end, side="left"))
        return cuts[low:high].tolist()

    def _readings(self, k: int, instances_N: np.ndarray) -> list[tuple[int, int, int]]:
        """(n, epoch from 1, which of `instances_N`) for each time that a source's instances were
        read, in the order of n."""
        source, mixture = self.dataset.sources[k], self.dataset.mixture
        if not len(instances_N):
            return []
        found = []
        first, last = self._counts(self.first_n)[k], self._counts(self.last_n)[k]
        for epoch, start, end in _epochs(source, first, last):
            at_N = source.order.positions(epoch, instances_N)
            for i in np.flatnonzero((start <= at_N) & (at_N < end)).tolist():
                found.append((epoch * source.epoch_length + int(at_N[i]), epoch + 1, i))
        if mixture and found:
            ns = mixture.positions(k, np.array([j for j, _, _ in found])).tolist()
            found = [(n, *rest) for n, (_, *rest) in zip(ns, found, strict=True)]
        return sorted(found)

    def _count_read(self, k: int, was_read_N: np.ndarray) -> tuple[int, int] | None:
        """Documents of which some token was read, and all; None where they are not known."""
        some = total = 0
        for f, file in enumerate(self.dataset.sources[k].files):
            if not storage.exists(file.documents_path):
                return None
            cuts, spans = self._cuts(k, f), document_spans(file, None)
            before = np.concatenate([[0], np.cumsum(was_read_N[cuts[:, 0]])])
            low = np.searchsorted(cuts[:, 2], spans[:, 0], side="right")
            high = np.searchsorted(cuts[:, 1], spans[:, 1], side="left")
            some += int(np.count_nonzero(before[high] > before[np.minimum(low, high)]))
            total += len(spans)
        return some, total

    def _cuts(self, k: int, f: int) -> np.ndarray:
        """The pieces of a file that instances are made of, see `Instances.cuts`."""
        if (k, f) not in self._cuts_of:
            self._cuts_of[k, f] = self.dataset.sources[k].instances.cuts(f)
        return self._cuts_of[k, f]

    def _counts(self, n: int) -> list[int]:
        """How many of the first n instances each source gives."""
        return self.dataset.mixture.counts(n) if self.dataset.mixture else [n]

    def _files(self) -> Iterator[tuple[int, int, TokenFile]]:
        for k, source in enumerate(self.dataset.sources):
            for f, file in enumerate(source.files):
                yield k, f, file

    def _no_document(self, name: str) -> str:
        files = [file for _, _, file in self._files()]
        known = [file for file in files if storage.exists(file.documents_path)]
        if not known:
            return (
                f"--document={name}: none of the {len(files)} token files has a .csv.gz beside it, "
                "so that documents have no names; find its text with --text"
            )
        ids: list[str] = []
        for file in known:
            if len(ids) < _LOOKED_AT:
                ids += [d.id for d in file.documents() or []][:_LOOKED_AT]
        near = [i for i in ids if name.lower() in i.lower()][:_NEAR]
        near = near or difflib.get_close_matches(name, ids, n=_NEAR, cutoff=0.5)
        hint = f"; the first is {ids[0]}" if ids else "; they have no rows"
        hint = f"; similar are {', '.join(near)}" if near else hint
        return f"--document={name}: no document of {len(known)} token files has this id{hint}"


def _offset(source: Source, instance: int, file: TokenFile, start: int) -> int:
    """Where in its row the piece of an instance that begins at `start` of a file is."""
    at = 0
    for piece in source.instances.pieces(instance):
        if (piece.file, piece.start) == (file, start):
            break
        at += piece.end - piece.start
    return at


def _epochs(source: Source, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """(epoch from 0, start, end): the parts of epochs that instances [first, last) come from."""
    length = source.epoch_length
    while first < last:
        epoch, start = divmod(first, length)
        end = min(length, start + last - first)
        yield epoch, start, end
        first += end - start
