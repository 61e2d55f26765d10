"""Token files in the OLMo format: a headerless array of unsigned integers, and `.csv.gz` beside it.

Finding, checking, reading and writing files; nothing about instances or order.
"""

import csv
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from olmo_jax import storage
from olmo_jax.data.megatron import read_index
from olmo_jax.data.remote_tokens import RemoteTokens
from olmo_jax.errors import UserError
from olmo_jax.files import write_bytes

DTYPES = ("uint8", "uint16", "uint32", "uint64")
_CHECK_BLOCKS, _CHECK_TOKENS = 8, 4096


class Document(NamedTuple):
    """A row of the `.csv.gz`: tokens [start, end) of the file, and where the text came from."""

    start: int
    end: int
    id: str
    src: str
    loc: int
    """Line in `src`, counted from 1."""


@dataclass(frozen=True)
class TokenFile:
    """A checked token file. Holds no open file, so it pickles to worker processes."""

    path: str
    dtype: str
    size: int
    """Tokens in the file."""

    @property
    def tokens(self) -> np.ndarray | RemoteTokens:
        """The whole file as a read-only memory map, (size,); elsewhere, its slices are reads."""
        if storage.is_remote(self.path):
            return RemoteTokens(self.path, self.dtype, self.size)
        return _memory_map(self.path, self.dtype, self.size)

    @property
    def documents_path(self) -> str:
        return documents_path(self.path)

    def documents(self) -> list[Document] | None:
        """The file's documents from its `.csv.gz`, or None when there is no such file."""
        return read_documents(self.documents_path, self.size)


def documents_path(path: str) -> str:
    """The file that says where a token file's documents are: `.csv.gz`, or Megatron's `.idx`."""
    if path.endswith(".bin"):
        return path.removesuffix(".bin") + ".idx"
    return path.removesuffix(".npy") + ".csv.gz"


def smallest_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds vocab_size - 1, e.g. uint16 for 50,280."""
    return next(d for d in DTYPES if vocab_size - 1 <= np.iinfo(d).max)


def find_files(patterns: Iterable[str], what: str = "token file") -> list[str]:
    """Paths and globs to files: the given order, sorted within a glob. Errors call them `what`.

    Raises UserError for a missing file or a glob without a match.
    """
    found: list[str] = []
    for pattern in patterns:
        if storage.is_remote(pattern):
            found += _find_remote(pattern, what)
        elif "://" in pattern:
            raise UserError(
                f"{pattern}: token files are read from a local disk, gs://, s3://, http:// or "
                "https://; copy it to one"
            )
        elif os.path.isfile(pattern):
            found.append(pattern)
        elif glob.has_magic(pattern):
            matches = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
            if not matches:
                raise UserError(f"{pattern}: no file matches; check the folder and the pattern")
            found += matches
        elif os.path.isdir(pattern):
            raise UserError(f"{pattern}: is a folder; name its files, e.g. {pattern}/*.npy")
        else:
            raise UserError(f"{pattern}: no such {what}")
    return found


def _find_remote(pattern: str, what: str) -> list[str]:
    try:
        if not glob.has_magic(pattern):
            if not storage.exists(pattern):
                raise UserError(f"{pattern}: no such {what}")
            return [pattern]
        if storage.is_web(pattern):
            raise UserError(f"{pattern}: a web server lists no files; name each one")
        found = storage.matches(pattern)
    except OSError as e:
        raise UserError(f"{pattern}: cannot be looked for: {e.strerror or e}") from None
    if not found:
        raise UserError(f"{pattern}: no file matches; check the folder and the pattern")
    return found


def open_binary(path: str) -> BinaryIO:
    """A small file for reading: one on this machine, or all of one elsewhere. Raises OSError."""
    return io.BytesIO(storage.read(path)) if storage.is_remote(path) else open(path, "rb")


def open_token_file(path: str, dtype: str, vocab_size: int) -> TokenFile:
    """Check size, header and a sample of the ids, and return the file.

    Raises UserError for an empty or unreadable file, a size that is no multiple of the type, a
    real numpy header, or a sampled id that is not below `vocab_size`.
    """
    try:
        n_bytes = storage.size(path)
        magic = storage.read(path, 0, min(6, n_bytes))
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    if path.endswith(".bin") and storage.exists(documents_path(path)):
        index_dtype, _ = read_index(documents_path(path))
        if index_dtype != dtype:
            raise UserError(f"{path}: its .idx says {index_dtype}, not {dtype}; set Data.dtype")
    width = np.dtype(dtype).itemsize
    if n_bytes == 0:
        raise UserError(f"{path}: empty token file; remove it from the data or write it again")
    if magic == b"\x93NUMPY":
        raise UserError(
            f"{path}: has a numpy header, but token files are raw arrays; "
            f"write it with array.astype('{dtype}').tofile(path)"
        )
    if n_bytes % width:
        raise UserError(
            f"{path}: {n_bytes} bytes is not a multiple of {width} ({dtype}): truncated after "
            f"token {n_bytes // width}, or written with another dtype"
        )
    file = TokenFile(path, dtype, n_bytes // width)
    tokens = file.tokens
    for start in np.linspace(0, max(0, file.size - _CHECK_TOKENS), _CHECK_BLOCKS, dtype=np.int64):
        check_ids(tokens[start : start + _CHECK_TOKENS], vocab_size, file, int(start))
    return file


def open_global_indices(path: str) -> TokenFile:
    """A file that holds an order: instance numbers as raw uint32. Raises UserError."""
    try:
        n_bytes = storage.size(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    if n_bytes == 0 or n_bytes % 4 or storage.read(path, 0, 6) == b"\x93NUMPY":
        raise UserError(f"{path}: is not a raw array of uint32, as the original's order is")
    return TokenFile(path, "uint32", n_bytes // 4)


def check_ids(tokens: np.ndarray, vocab_size: int, file: TokenFile, offset: int) -> None:
    """Raise UserError with file and offset if one of `tokens`, read at `offset`, is too large."""
    if int(tokens.max(initial=0)) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{file.path}: token {int(tokens[at])} at token offset {offset + at} is outside the "
            f"vocabulary of {vocab_size}; wrong dtype ({file.dtype}), tokenizer or vocab_size?"
        )


def read_documents(path: str, n_tokens: int | None = None) -> list[Document] | None:
    """Rows of a `.csv.gz`; None when the file does not exist.

    Raises UserError when a row is not `start,end,id,src,loc` or lies beyond `n_tokens`.
    """
    try:
        if not storage.exists(path):
            return None
        if path.endswith(".idx"):
            ends = megatron_ends(path, n_tokens)
            return megatron_documents(path, ends, 0, len(ends))
        with gzip.open(open_binary(path), "rt", encoding="utf-8", newline="") as f:
            documents = [_parse_row(row, path, i) for i, row in enumerate(csv.reader(f), 1)]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as e:
        raise UserError(f"{path}: not a readable .csv.gz ({e}); write it again") from None
    for before, after in pairwise([Document(0, 0, "", "", 0), *documents]):
        if not before.end <= after.start <= after.end:
            raise UserError(
                f"{path}: document {after.id!r} [{after.start}, {after.end}) overlaps the one "
                f"before it, which ends at token {before.end}"
            )
    if n_tokens is not None and documents:
        _check_end(path, documents[-1].end, n_tokens)
    return documents


@lru_cache(maxsize=8)
def megatron_ends(path: str, n_tokens: int | None) -> np.ndarray:
    """Where the documents of a `.idx` end, (documents,) int64."""
    _, ends = read_index(path)
    if n_tokens is not None and len(ends):
        _check_end(path, int(ends[-1]), n_tokens)
    return ends


def megatron_documents(path: str, ends: np.ndarray, first: int, last: int) -> list[Document]:
    """Documents [first, last) of a `.idx`, which are named by their number."""
    starts = [int(ends[first - 1]) if first else 0, *ends[first : last - 1].tolist()]
    spans = zip(starts, ends[first:last].tolist(), strict=False)
    return [
        Document(start, end, str(i), path, i + 1) for i, (start, end) in enumerate(spans, first)
    ]


def check_complete(file: TokenFile) -> None:
    """Raise UserError when the file ends before its last document does."""
    if file.documents_path.endswith(".idx"):
        if storage.exists(file.documents_path):
            megatron_ends(file.documents_path, file.size)
    elif storage.exists(file.documents_path):
        try:
            with gzip.open(open_binary(file.documents_path), "rb") as f:
                last = f.read().rstrip(b"\n").rpartition(b"\n")[2]
            _check_end(file.documents_path, int(last.split(b",")[1]), file.size)
        except (OSError, EOFError, zlib.error, IndexError, ValueError):
            read_documents(file.documents_path, file.size)  # says what is wrong, and in which row


def _check_end(path: str, end: int, n_tokens: int) -> None:
    if end > n_tokens:
        idx = path.endswith(".idx")
        token_file = path.removesuffix(".idx").removesuffix(".csv.gz") + (".bin" if idx else ".npy")
        raise UserError(
            f"{token_file}: truncated: it holds {n_tokens} tokens, but its "
            f"{'.idx' if idx else '.csv.gz'} has a document that ends at token {end}"
        )


def _parse_row(row: list[str], path: str, number: int) -> Document:
    try:
        # OLMo-core's own files have start and end only.
        start, end, name, src, loc = row if len(row) != 2 else (*row, "", "", "0")
        return Document(int(start), int(end), name, src, int(loc))
    except ValueError:
        raise UserError(f"{path}: row {number} is not start,end,id,src,loc: {row}") from None


def write_token_file(
    path: str | Path, tokens: np.ndarray, documents: Iterable[Document], dtype: str
) -> TokenFile:
    """Write tokens and their `.csv.gz` whole or not at all (temporary file, then rename).

    The bytes depend on the arguments alone: the gzip header carries no time.
    """
    path = str(path)
    # The .csv.gz goes first: a token file that is there always has its documents.
    write_documents(path, documents)
    array = np.ascontiguousarray(tokens, dtype=dtype)
    write_atomically(path, array.tobytes())
    return TokenFile(path, dtype, len(array))


def write_documents(path: str, documents: Iterable[Document]) -> None:
    """Write the `.csv.gz` of the token file at `path`."""
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows(documents)
    write_atomically(documents_path(path), gzip.compress(rows.getvalue().encode(), mtime=0))


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one."""
    path = storage.location(path)
    try:
        if not storage.is_remote(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror or e}") from None


# A mapping keeps a file descriptor open; 256 stays clear of the usual limit of 1024.
@lru_cache(maxsize=256)
def _memory_map(path: str, dtype: str, size: int) -> np.ndarray:
    try:
        return np.memmap(path, dtype=dtype, mode="r", shape=(size,))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be mapped any more ({e}); was it changed?") from None
