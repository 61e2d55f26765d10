"""Documents of token files by place and by name, not all of them in memory where that counts."""

import csv
import gzip
import io
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from olmo_jax import storage
from olmo_jax.data.token_files import (
    Document,
    TokenFile,
    megatron_documents,
    megatron_ends,
    open_binary,
)

_FEW = 256 << 20  # bytes of .csv.gz in all: a few seconds


def documents_between(file: TokenFile, start: int, end: int) -> tuple[Document, ...]:
    """The file's documents that overlap tokens [start, end); none where they are not known."""
    if _has_idx(file):
        # A list of the 146 million sequences of Pythia's own file would take 30 GB.
        ends = megatron_ends(file.documents_path, file.size)
        first, last = np.searchsorted(ends, [start, end - 1], side="right").tolist()
        last = min(last + 1, len(ends))
        return tuple(megatron_documents(file.documents_path, ends, first, last))
    documents = _documents(file)
    first = bisect_right(documents, start, key=lambda d: d.end)
    return tuple(documents[first : bisect_left(documents, end, key=lambda d: d.start)])


def documents_named(file: TokenFile, name: str) -> list[Document]:
    """The file's documents with this id. Parses its .csv.gz only where the id is in it."""
    if _has_idx(file):
        ends = megatron_ends(file.documents_path, file.size)
        if name.isdecimal() and int(name) < len(ends):
            return megatron_documents(file.documents_path, ends, int(name), int(name) + 1)
        return []
    if not storage.exists(file.documents_path):
        return []
    cell = io.StringIO()
    csv.writer(cell, lineterminator="").writerow([name])
    try:
        with gzip.open(open_binary(file.documents_path), "rb") as f:
            if f",{cell.getvalue()},".encode() not in f.read():
                return []
    except (OSError, EOFError, zlib.error):
        pass  # `_documents` says what is wrong
    return [d for d in _documents(file) if d.id == name]


def documents_are_few(files: Iterable[TokenFile]) -> bool:
    """Whether reading every .csv.gz takes seconds rather than hours."""
    paths = [f.documents_path for f in files]
    sizes = storage.map_files(lambda p: storage.size(p) if storage.exists(p) else 0, paths, paths)
    return sum(sizes) < _FEW


def _has_idx(file: TokenFile) -> bool:
    return file.documents_path.endswith(".idx") and storage.exists(file.documents_path)


@lru_cache(maxsize=8)
def _documents(file: TokenFile) -> list[Document]:
    return file.documents() or []
