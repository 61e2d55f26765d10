"""What a model has read, by steps of its run, and places in it to ask the model about.

Steps are counted as in metrics.jsonl: the first is 1, and a checkpoint of step S has read 1 to S.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from olmo_jax.data import DataSet
from olmo_jax.data.batch import Instance
from olmo_jax.data.trace import Trace
from olmo_jax.errors import UserError


class Place(NamedTuple):
    """A sequence of tokens in an instance, and where training meets it."""

    n: int
    """Position of the instance in the data's order."""
    instance: int
    offset: int
    """Of its first token in the instance."""
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """What a model has read of a run's data."""

    trace: Trace
    steps: int
    """How many the model was trained for; those up to `trace.first` are of another run."""

    @property
    def dataset(self) -> DataSet:
        return self.trace.dataset

    @property
    def read(self) -> range:
        """The positions in the order that the model has read."""
        first = self.trace.first_n
        return range(first, max(first, self.trace.start(self.steps + 1)))

    @property
    def next(self) -> range:
        """Those that come next, as many (all for a model that has read nothing), as far as a source
        is still gone through for the first time (`is_new`): empty where all data were read."""
        end = max(self._first_epochs())
        return range(self.read.stop, min(end, self.read.stop + (len(self.read) or end)))

    @property
    def is_first(self) -> bool:
        """Whether the model has read no instance twice."""
        return self.read.stop <= min(self._first_epochs())

    def _first_epochs(self) -> list[int]:
        """How far in the order each source comes for the first time, within a period's rounding."""
        mixture = self.dataset.mixture
        parts, period = (mixture.parts, mixture.period) if mixture else ([1], 1)
        lengths = [source.epoch_length for source in self.dataset.sources]
        return [n * period // part for n, part in zip(lengths, parts, strict=True)]

    def is_new(self, n: int) -> bool:
        """Whether no earlier position has the same instance."""
        return self.trace.epoch(n) == 1


class Ranges(Sequence[int]):
    """Ranges one after the other, of which none is listed: of many steps they are long."""

    def __init__(self, ranges: Iterable[range]):
        self._ranges = [some for some in ranges if some]
        self._ends = list(accumulate(map(len, self._ranges)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = bisect_right(self._ends, i)
        return self._ranges[k][i - self._ends[k]]  # counted from its end


def evenly(of: Sequence, most: int) -> list:
    """At most so many, evenly spread from the first to the last."""
    if len(of) <= most:
        return list(of)
    return [of[i] for i in np.linspace(0, len(of) - 1, most).round().astype(np.int64)]


@dataclass
class Places:
    """Sequences of `length` tokens at one offset of instances, or where documents begin."""

    length: int
    offset: int = 0
    at_documents: bool = False
    skipped: int = field(default=0, init=False)
    """So far: too close to the end of the instance (or document), or, under document masking,
    across documents, which the model has not read as one text."""

    def of(self, dataset: DataSet, positions: Iterable[int]) -> list[Place]:
        found = []
        for n in positions:
            row = dataset.instance(n)
            for offset in self._offsets(dataset, row):
                end = offset + self.length
                segments = row.segment_ids_T[offset:end]
                if len(segments) < self.length or not (segments == max(segments[0], 1)).all():
                    self.skipped += 1
                    continue
                tokens = tuple(row.tokens_T[offset:end].tolist())
                found.append(Place(n, row.instance_id, offset, tokens))
        return found

    def _offsets(self, dataset: DataSet, row: Instance) -> list[int]:
        if not self.at_documents:
            return [self.offset]
        starts = document_starts(dataset, row)
        end = int(np.count_nonzero(row.segment_ids_T))
        whole = [a for a, b in pairwise([*starts, end]) if b - a >= self.length]
        self.skipped += len(starts) - len(whole)
        return whole


def document_starts(dataset: DataSet, row: Instance) -> list[int]:
    """Offsets in an instance where documents begin: after an eos, or as the .csv.gz says. Raises
    UserError where the data tell neither."""
    n = int(np.count_nonzero(row.segment_ids_T))
    if (eos := dataset.config.eos_token_id) is not None:
        first = [0] if dataset.config.instances == "packed" else []  # a piece is a document
        return [*first, *(np.flatnonzero(row.tokens_T[: n - 1] == eos) + 1).tolist()]
    starts, at = [], 0
    for place in dataset.where(row.instance_id):
        if not place.documents:
            raise UserError(
                f"{place.path}: where documents begin is not known: give Data.eos_token_id, or the "
                ".csv.gz beside the token file"
            )
        starts += [at + d.start - place.start for d in place.documents if d.start >= place.start]
        at += place.end - place.start
    return starts
