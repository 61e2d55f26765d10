"""Documents as JSON lines, plain, .gz or .zst: `id` and `text` required, anything else is kept out.

Reading only; the format is Dolma's.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import zstandard

from olmo_jax.errors import UserError


class TextDocument(NamedTuple):
    """A line of a documents file."""

    id: str
    text: str
    line: int
    """Counted from 1."""
    bytes_read: int
    """How far into the file, as it is on disk, reading had got: for progress bars."""


class Row(NamedTuple):
    """A line of a JSONL file, and of its fields those that were asked for."""

    fields: dict[str, str]
    line: int
    bytes_read: int


def read_jsonl(path: str | Path) -> Iterator[TextDocument]:
    """The documents of one file, in order; blank lines are passed over.

    Raises UserError naming file and line for what is not a JSON object with `id` and `text`.
    """
    for row in read_rows(path, ("id", "text")):
        yield TextDocument(row.fields["id"], row.fields["text"], row.line, row.bytes_read)


def read_rows(path: str | Path, fields: tuple[str, ...]) -> Iterator[Row]:
    """The lines of one file, in order, as `read_jsonl`; each must have these fields as strings."""
    path = str(path)
    line = 0
    try:
        with open(path, "rb") as raw:
            for line, text in enumerate(_lines(raw, path), 1):
                if text.strip():
                    yield Row(_parse(text, path, line, fields), line, raw.tell())
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"{path}: cannot be read after line {line}: {reason}") from None


def total_bytes(paths: list[str]) -> int:
    """Bytes on disk; raises UserError for a missing file."""
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such documents file")
    return sum(os.path.getsize(path) for path in paths)


def _lines(raw: BinaryIO, path: str) -> Iterator[str]:
    if path.endswith(".gz"):
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    elif path.endswith(".zst"):
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        stream = cast(BinaryIO, reader)
    else:
        stream = raw
    # JSON strings hold no raw line ends but may hold others, e.g. U+2028: split at \n only.
    return iter(io.TextIOWrapper(stream, encoding="utf-8", newline="\n"))


def _parse(text: str, path: str, line: int, fields: tuple[str, ...]) -> dict[str, str]:
    try:
        row = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path}: line {line} is not JSON ({e})") from None
    for field in fields:
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UserError(f"{path}: line {line} has no string {field!r}, as every document must")
    return {field: row[field] for field in fields}
