"""Decontamination: where documents hold n-grams of evaluation sets.

An index of the sets' n-grams is a file; looking documents up in it is a tagger, `ngram_overlap`.
Words are runs of letters and digits in small letters, so that punctuation and spacing do not count.
"""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
from pydantic import Field, model_validator

from olmo_jax import storage
from olmo_jax.curate.config import Config
from olmo_jax.curate.documents import Attributes, Document, Span, find_documents, writing
from olmo_jax.data.documents import parse_line, read_lines
from olmo_jax.errors import UserError

Questions = Callable[[Sequence[str]], Iterable[Iterable[str]]]
"""Names of tasks to the texts of each of their questions. (Tasks are `eval`'s, which this room does
not know; the command line brings them together.)"""
_WORD = re.compile(r"\w+")
_PRIME = 0x9E3779B97F4A7C15


class DecontaminateConfig(Config):
    """What documents are looked through for."""

    against: tuple[str, ...] = ()
    """Files of evaluation sets, JSON lines or Parquet; every text in them counts, whatever its
    field is called."""
    tasks: tuple[str, ...] = ()
    """Tasks and suites of `olmo-jax eval --list`: their questions, and those with the right answer,
    without worked examples and the words of the format."""
    fields: tuple[str, ...] = ()
    """Only these fields, e.g. question; at any depth."""
    ngram_length: int = Field(default=13, ge=1)
    """In words; GPT-3's 13."""
    min_words: int = Field(default=8, ge=1)
    """A text with fewer words than an n-gram is looked for whole, from this many on."""

    @model_validator(mode="after")
    def _something(self) -> "DecontaminateConfig":
        if not self.against and not self.tasks:
            raise ValueError("give decontaminate.against (files), decontaminate.tasks, or both")
        return self


class Index(NamedTuple):
    """What is in an index."""

    ngrams: int
    questions: int
    too_short: int
    """Questions without a text of `min_words`, which are not looked for."""


def write_index(config: DecontaminateConfig, out: str, questions: Questions | None = None) -> Index:
    """Writes the index of the n-grams of files and of `questions(config.tasks)`. Raises
    UserError."""
    if os.path.isdir(out):
        raise UserError(f"{out}: is a folder; name a file in it for the index, .npz")
    hashes: dict[int, list[np.ndarray]] = {}
    total = too_short = 0
    for texts in _questions(config, questions):
        is_short = True
        for text in texts:
            words = _WORD.findall(_lower(text))
            n = min(config.ngram_length, len(words))
            if n >= min(config.min_words, config.ngram_length):
                hashes.setdefault(n, []).append(_ngram_hashes(words, n))
                is_short = False
        total += 1
        too_short += is_short
    if not hashes:
        raise UserError(
            f"{', '.join([*config.against, *config.tasks])}: no text of {config.min_words} words "
            "or more" + (f" in the fields {', '.join(config.fields)}" if config.fields else "")
        )
    index = {str(n): np.unique(np.concatenate(found)) for n, found in sorted(hashes.items())}
    np.savez(content := io.BytesIO(), **index)  # type: ignore[arg-type]
    # One that is the same stays, with its date: what was made with it need not be made again.
    if not storage.exists(out) or storage.read(out) != content.getvalue():
        with writing(out) as file:
            file.write(content.getvalue())
    return Index(sum(map(len, index.values())), total, too_short)


def _questions(config: DecontaminateConfig, questions: Questions | None) -> Iterator[Iterable[str]]:
    for path in find_documents(config.against) if config.against else ():
        for line in read_lines(path):
            yield _texts(parse_line(line, path), config.fields, not config.fields)
    if config.tasks:
        assert questions is not None, "the caller knows the tasks"
        yield from questions(config.tasks)


class NgramOverlap:
    """`ngram_overlap:INDEX.npz`: the spans that are in the index (`contaminated`), and their share
    of the document's words (`doc_frac`)."""

    def __init__(self, path: str | None):
        if not path or not storage.exists(path):
            raise UserError(f"ngram_overlap: {path}: no such index; see data decontaminate")
        with storage.open_stream(path) as file, np.load(file) as content:
            self._index = {int(n): content[n] for n in content}

    def __call__(self, document: Document) -> Attributes:
        text = document.text
        lower = _lower(text)
        places = [match.span() for match in _WORD.finditer(lower)]
        words = [lower[start:end] for start, end in places]
        inside = np.zeros(len(words) + 1, np.int64)
        for n, index in self._index.items():
            if len(words) >= n:
                hashes = _ngram_hashes(words, n)
                at = np.searchsorted(index, hashes)
                found = np.flatnonzero(index[np.minimum(at, len(index) - 1)] == hashes)
                np.add.at(inside, found, 1)
                np.add.at(inside, found + n, -1)
        is_inside = np.cumsum(inside[:-1]) > 0
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_inside, [False]])))
        spans: list[Span] = [
            (places[first][0], places[last - 1][1], 1.0)
            for first, last in edges.reshape(-1, 2).tolist()
        ]
        share = float(is_inside.mean()) if len(words) else 0.0
        attributes: Attributes = {"contaminated": spans} if spans else {}
        return attributes | {"doc_frac": [(0, len(text), share)]}


def _lower(text: str) -> str:
    """In small letters, as long as it was: spans count in the text."""
    return text.replace("\u0130", "i").lower()  # the only letter whose small form is two


def _texts(value: Any, fields: Sequence[str], wanted: bool) -> Iterator[str]:
    """All strings in a JSON value, or those below one of `fields`."""
    if isinstance(value, str):
        if wanted:
            yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, fields, wanted or key in fields)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, fields, wanted)


def _ngram_hashes(words: list[str], n: int) -> np.ndarray:
    """A hash of each n words in a row, uint64: the words' hashes as digits of a number."""
    word_W = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words], np.uint64)
    total = np.zeros(len(words) - n + 1, np.uint64)
    for k in range(n):
        total = total * np.uint64(_PRIME) + word_W[k : len(words) - n + 1 + k]
    return total
