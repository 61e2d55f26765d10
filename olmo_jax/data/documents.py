"""Documents: JSON lines (plain, .gz, .zst) and Parquet, on this machine, in a bucket or at http(s).

Reading only; the format is Dolma's (`id`, `text`, and what else there is), or RedPajama's (`text`
and `meta`, where a document is named after its file and line). Writing is `curate`'s.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import zstandard

from olmo_jax import storage
from olmo_jax.errors import UserError

# A line is held whole; the longest books have 10 to 20 MB. Beyond this it is no document.
MAX_LINE_BYTES = 128 << 20
_BUFFER = 1 << 20


class TextDocument(NamedTuple):
    """A line of a documents file."""

    id: str
    text: str
    line: int
    """Counted from 1."""
    bytes_read: int
    """How far into the file, as it is on disk, reading had got: for progress bars."""


class Line(NamedTuple):
    """A line as it was read: JSON's bytes, or a row of a Parquet file as a dict."""

    number: int
    content: bytes | dict[str, Any]
    bytes_read: int


def read_jsonl(path: str | Path) -> Iterator[TextDocument]:
    """The documents of one file, in order; blank lines are passed over.

    Raises UserError naming file and line for what is not a JSON object with `id` and `text`.
    """
    path = str(path)
    for line in read_lines(path):
        row = parse_line(line, path)
        text = text_field(row, "text", path, line.number)
        yield TextDocument(document_id(row, path, line.number), text, line.number, line.bytes_read)


def read_lines(path: str) -> Iterator[Line]:
    """The lines of a file that are not blank, in bounded memory, without a look inside them.

    Raises UserError for a file that cannot be read to its end, and for a line above
    MAX_LINE_BYTES.
    """
    if path.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    number = 0
    try:
        with storage.open_stream(path) as raw:
            readline = partial(_decompressed(raw, path).readline, MAX_LINE_BYTES + 1)
            for number, content in enumerate(iter(readline, b""), 1):
                if len(content) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{path}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB; "
                        "is it one document a line?"
                    )
                if not content.isspace():
                    yield Line(number, content, raw.tell())
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"{path}: cannot be read after line {number}: {reason}") from None


def parse_line(line: Line, path: str) -> dict[str, Any]:
    """A line as a dict. Raises UserError with file and line for what is no JSON object."""
    if isinstance(line.content, dict):
        return line.content
    try:
        row = json.loads(line.content.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: line {line.number} is not UTF-8 text ({e})") from None
    except ValueError as e:
        raise UserError(f"{path}: line {line.number} is not JSON ({e})") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {line.number} is not a JSON object")
    return row


def text_field(row: dict[str, Any], name: str, path: str, number: int) -> str:
    """A field that every document must have as a string. Raises UserError where one has not."""
    if not isinstance(row.get(name), str):
        raise UserError(f"{path}: line {number} has no string {name!r}, as every document must")
    return row[name]


def document_id(row: dict[str, Any], path: str, number: int) -> str:
    """The document's `id`; RedPajama's documents have none, and are named after file and line."""
    if isinstance(name := row.get("id"), str):
        return name
    if name is None and "meta" in row:
        return f"{os.path.basename(path)}:{number}"
    raise UserError(f"{path}: line {number} has no string 'id', as every document must")


def total_bytes(paths: list[str]) -> int:
    """Bytes of the files as they are stored; raises UserError for a missing file."""
    try:
        return sum(storage.map_files(storage.size, paths, paths))
    except OSError as e:
        raise UserError(f"{e.filename or paths}: no such documents file") from None


def _decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.endswith((".zst", ".zstd")):
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, reader), _BUFFER))
    if isinstance(raw, io.BufferedReader):
        return raw
    return io.BufferedReader(cast(io.RawIOBase, raw), _BUFFER)  # fsspec's lines have no limit


def _read_parquet(path: str) -> Iterator[Line]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: install olmo-jax[curate] to read Parquet") from None
    number = 0
    try:
        with storage.open_stream(path, seeks=True) as raw:
            file = pyarrow.parquet.ParquetFile(raw)
            size, total = storage.size(path), max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Line(number, row, size * number // total)
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"{path}: cannot be read after row {number}: {e}") from None
