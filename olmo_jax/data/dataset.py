"""DataSet: the n-th training instance as a pure function, and look-ups between files and steps.

Reads token files by memory map; prefetch and worker processes are `loader`'s.
"""

import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from olmo_jax import storage
from olmo_jax.data.batch import Batch, Instance, make_instance, stack
from olmo_jax.data.config import DataConfig
from olmo_jax.data.document_index import documents_are_few, documents_between
from olmo_jax.data.fingerprint import contents, fingerprint, fingerprint_files
from olmo_jax.data.index_file import default_index_dir
from olmo_jax.data.instances import FixedInstances, Instances, Piece
from olmo_jax.data.mixture import Mixture
from olmo_jax.data.order import Olmo, Order, Permute, Sequential
from olmo_jax.data.packing import PackedInstances, document_spans
from olmo_jax.data.repetition import is_repetitive
from olmo_jax.data.steps import Steps
from olmo_jax.data.token_files import (
    Document,
    TokenFile,
    check_complete,
    check_ids,
    find_files,
    open_binary,
    open_global_indices,
    open_token_file,
    smallest_dtype,
)
from olmo_jax.errors import UserError


@dataclass(frozen=True)
class Source:
    """The files of one weight, their instances and their order."""

    name: str
    files: tuple[TokenFile, ...]
    instances: Instances
    order: Order
    epoch_length: int
    first_id: int


@dataclass(frozen=True)
class Location:
    """Where a stretch of an instance lies: tokens [start, end) of a file, and its documents."""

    path: str
    start: int
    end: int
    documents: tuple[Document, ...]
    """Those that overlap the stretch, from the .csv.gz; empty when there is none."""


def open_dataset(config: DataConfig, vocab_size: int) -> "DataSet":
    """Find and check the files, build what index files the configuration needs.

    Raises UserError, naming the file and where in it, for anything wrong with them.
    """
    if not config.paths and not config.sources:
        raise UserError(
            "no data: give Data.paths (token files or globs), or Data.sources with Data.weights"
        )
    dtype = config.dtype or smallest_dtype(vocab_size)
    if config.eos_token_id is not None and not 0 <= config.eos_token_id < vocab_size:
        raise UserError(
            f"Data.eos_token_id {config.eos_token_id} is outside the vocabulary of {vocab_size}"
        )
    files = {
        name: tuple(_open_files(find_files(patterns), dtype, vocab_size))
        for name, patterns in (config.sources or {"": config.paths}).items()
    }
    every_file = [file for opened in files.values() for file in opened]
    if documents_are_few(every_file):
        storage.map_files(check_complete, every_file, [f.path for f in every_file])
    return DataSet(config, vocab_size, files)


def _open_files(paths: list[str], dtype: str, vocab_size: int) -> list[TokenFile]:
    return storage.map_files(lambda path: open_token_file(path, dtype, vocab_size), paths, paths)


class DataSet:
    """Instances in their order. Holds no open file: it pickles to worker processes.

    Instance ids are numbers in file order (sources one after the other), whatever the order or the
    mixture; n counts what training consumes and runs on over the epochs without a gap.
    """

    def __init__(
        self, config: DataConfig, vocab_size: int, files: dict[str, tuple[TokenFile, ...]]
    ):
        self.config, self.vocab_size = config, vocab_size
        self.steps = Steps(config.batch_size, config.batch_size_schedule)
        self.index_dir = Path(config.index_dir) if config.index_dir else default_index_dir()
        self.mixture = Mixture([config.weights[name] for name in files]) if config.weights else None
        self.sources: list[Source] = []
        for k, (name, source_files) in enumerate(files.items()):
            instances = self._cut(source_files)
            length = self._epoch_length(len(instances))
            order = self._order(k, len(instances))
            self.sources.append(
                Source(name, source_files, instances, order, length, self._n_instances())
            )
        self._first_ids = np.array([s.first_id for s in self.sources], np.int64)

    def _n_instances(self) -> int:
        return sum(len(s.instances) for s in self.sources)

    def _cut(self, files: tuple[TokenFile, ...]) -> Instances:
        c = self.config
        if c.instances == "packed":
            return PackedInstances(
                files, c.sequence_length, c.group_size, c.eos_token_id, self.index_dir
            )
        return FixedInstances(files, c.sequence_length, c.max_target_sequence_length)

    def _order(self, k: int, size: int) -> Order:
        c = self.config
        if c.order == "permute":
            return Permute(size, c.seed, stream=k)
        if c.order == "olmo":
            orders = [open_global_indices(path) for path in c.global_indices]
            return Olmo(size, c.seed, c.first_epoch, self.index_dir, orders, self._chunk())
        return Sequential()

    def _chunk(self) -> int:
        """Neighbours that order olmo keeps together."""
        return (self.config.max_target_sequence_length or 0) // self.config.sequence_length or 1

    def _epoch_length(self, size: int) -> int:
        # Both originals end an epoch where the next batch would not be full, and then shuffle anew.
        if self.config.order == "olmo" and self.mixture is None:
            return size - size % self.steps.last_batch_size or size
        return size

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the files and of all that says which tokens the n-th instance holds."""
        c = self.config
        packed = c.instances == "packed"
        olmo: dict[str, Any] = {}
        if c.order == "olmo" and self._chunk() > 1:
            olmo["chunk"] = self._chunk()
        if c.global_indices:
            olmo["global_indices"] = [contents(path) for path in c.global_indices]
        return fingerprint(
            olmo
            | {
                "sequence_length": c.sequence_length,
                "instances": c.instances,
                "max_target_sequence_length": c.max_target_sequence_length,
                "packing": [c.group_size, c.eos_token_id] if packed else None,
                "order": [c.order, c.seed, c.first_epoch if c.order == "olmo" else None],
                "mixture": self.mixture.parts if self.mixture else None,
                "epochs": [s.epoch_length for s in self.sources],
                "files": [fingerprint_files(s.files, packed) for s in self.sources],
            }
        )

    def __len__(self) -> int:
        """Instances in one epoch, over all sources."""
        return sum(s.epoch_length for s in self.sources)

    @property
    def tokens_per_instance(self) -> int:
        """sequence_length, padding included."""
        return self.config.sequence_length

    def first_n(self, step: int) -> int:
        """The first n of a step: instances consumed before it. Steps are counted from 0."""
        return self.steps.first_n(step)

    def batch_size(self, step: int) -> int:
        """Instances in a step, over all processes."""
        return self.steps.batch_size(step)

    def step_of(self, n: int) -> int:
        """The step that consumes the n-th instance."""
        return self.steps.step_of(n)

    def instance_id(self, n: int) -> int:
        """The instance that training consumes n-th, counted from 0."""
        k, j = self.mixture(n) if self.mixture else (0, n)
        source = self.sources[k]
        epoch, i = divmod(j, source.epoch_length)
        return source.first_id + source.order(epoch, i)

    def instance(self, n: int) -> Instance:
        """The n-th instance that training consumes, as a row of a batch."""
        return self.row(self.instance_id(n))

    def row(self, instance_id: int) -> Instance:
        """An instance by its id. Raises UserError for a token outside the vocabulary."""
        pieces = self._pieces(instance_id)
        stretches = []
        for file, start, end in pieces:
            tokens = file.tokens[start:end]
            check_ids(tokens, self.vocab_size, file, start)
            stretches.append(tokens)
        tokens = stretches[0] if len(stretches) == 1 else np.concatenate(stretches)
        keep_loss = not (self.config.repetition_filter and is_repetitive(tokens))
        boundaries = self._boundaries(pieces, tokens)
        return make_instance(tokens, boundaries, self.tokens_per_instance, instance_id, keep_loss)

    def batch(self, step: int, rows: Iterable[int] | None = None) -> Batch:
        """These rows of a step's global batch (None: all), and the ids of all of its instances."""
        first, size = self.first_n(step), self.batch_size(step)
        ids = [self.instance_id(n) for n in range(first, first + size)]
        batch = stack([self.row(ids[row]) for row in (range(size) if rows is None else rows)])
        return batch._replace(instance_ids_B=np.array(ids, np.int64))

    def where(self, instance_id: int) -> list[Location]:
        """The stretches of files that make up an instance, with their documents."""
        return [
            Location(file.path, start, end, documents_between(file, start, end))
            for file, start, end in self._pieces(instance_id)
        ]

    def table(self) -> list[dict[str, Any]]:
        """A row for each source: name, files, bytes, tokens, documents (None if not known or too
        many to count), instances, share of the training instances."""
        count = documents_are_few([f for s in self.sources for f in s.files])
        return [
            {
                "source": s.name or "data",
                "files": len(s.files),
                "bytes": sum(f.size * np.dtype(f.dtype).itemsize for f in s.files),
                "tokens": sum(f.size for f in s.files),
                "documents": _count_documents(s.files) if count else None,
                "instances": len(s.instances),
                "share": self.mixture.parts[k] / self.mixture.period if self.mixture else 1.0,
            }
            for k, s in enumerate(self.sources)
        ]

    def _pieces(self, instance_id: int) -> list[Piece]:
        if not 0 <= instance_id < self._n_instances():
            raise UserError(
                f"there is no instance {instance_id}; the data has 0 to {self._n_instances() - 1}"
            )
        source = self.sources[int(np.searchsorted(self._first_ids, instance_id, "right")) - 1]
        return source.instances.pieces(instance_id - source.first_id)

    def _boundaries(self, pieces: list[Piece], tokens: np.ndarray) -> np.ndarray:
        """Offsets in the row, above 0, where documents start; none without document masking."""
        if not self.config.document_masking:
            return np.empty(0, np.int64)
        if self.config.instances == "packed":  # a piece is a document
            return np.cumsum([end - start for _, start, end in pieces])[:-1]
        if self.config.eos_token_id is not None:
            return np.flatnonzero(tokens[:-1] == self.config.eos_token_id) + 1
        [(file, start, end)] = pieces
        starts = _document_starts(file)
        lo, hi = np.searchsorted(starts, [start + 1, end])
        return starts[lo:hi] - start


@lru_cache(maxsize=64)
def _document_starts(file: TokenFile) -> np.ndarray:
    return document_spans(file, None)[:, 0]


def _count_documents(files: tuple[TokenFile, ...]) -> int | None:
    if not all(storage.exists(f.documents_path) for f in files):
        return None
    count = 0
    for file in files:
        with gzip.open(open_binary(file.documents_path), "rb") as f:
            count += sum(1 for _ in f)
    return count
