"""Documents and their attributes as Dolma lays them out: read with their line, written whole.

`…/documents/a.jsonl.gz` has the attributes of experiment x in `…/attributes/x/a.jsonl.gz`, line by
line. Finding and reading bytes is `data.documents`'; deciding anything is the taggers'.
"""

import gzip
import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from olmo_jax import storage
from olmo_jax.data.documents import Line, document_id, read_lines
from olmo_jax.data.token_files import find_files
from olmo_jax.errors import UserError
from olmo_jax.files import replacing

try:
    import msgspec
except ImportError:
    raise UserError("install olmo-jax[curate] for what makes token files of documents") from None

Span = tuple[int, int, float]
"""Start and end in characters of the text, and a score."""
Attributes = dict[str, list[Span]]

_BUFFER = 1 << 20
_NONE = msgspec.Raw(b"null")
_GZIP_LEVEL = 6  # 9 takes twice the time and saves 1 % on attributes


class Document(msgspec.Struct):
    """What taggers see. `metadata` and `url` are JSON that is not parsed yet
    (`fields` and `blocklists.url_of` do that)."""

    text: str
    id: str | None = None
    source: str | None = None
    metadata: msgspec.Raw = _NONE
    meta: msgspec.Raw = _NONE
    url: msgspec.Raw = _NONE

    def fields(self) -> dict[str, Any]:
        """The metadata (RedPajama's `meta`) as a dict; empty when there is none."""
        value = msgspec.json.decode(self.meta if self.meta != _NONE else self.metadata)
        return value if isinstance(value, dict) else {}


class Attributed(msgspec.Struct):
    """A line of an attributes file."""

    id: str
    attributes: Attributes
    source: str | None = None


_decode_document = msgspec.json.Decoder(Document).decode
_decode_attributed = msgspec.json.Decoder(Attributed).decode
encode = msgspec.json.Encoder().encode


def find_documents(patterns: Sequence[str]) -> list[str]:
    """Files of paths, globs and http(s) addresses: the given order, sorted within a glob. Raises
    UserError for a pattern without a match and for a file that is named twice."""
    found: list[str] = []
    for pattern in patterns:
        web = pattern.startswith(("http://", "https://"))
        found += [pattern] if web else find_files([pattern], "documents file")
    if not found:
        raise UserError("no documents given")
    for path in found:
        if found.count(path) > 1:
            raise UserError(f"{path}: is given twice")
    return found


def read_documents(path: str) -> Iterator[tuple[Document, Line]]:
    """The documents of a file with the lines they are in. `id` is always set. Raises UserError
    naming file and line."""
    for line in read_lines(path):
        document = _document(line, path)
        if document.id is None:
            row = {} if document.meta == _NONE else {"meta": None}
            document.id = document_id(row, path, line.number)
        yield document, line


def read_attributes(path: str) -> Iterator[Attributed]:
    """The lines of an attributes file. Raises UserError naming file and line."""
    for line in read_lines(path):
        try:
            yield _decode_attributed(line.content)  # type: ignore[arg-type]
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: line {line.number} is no line of attributes: {e}") from None


def attributes_path(path: str, experiment: str) -> str:
    """Where the attributes of a documents file belong. Raises UserError when the path has no
    folder `documents`. Those of a Parquet file are .jsonl.gz."""
    before, found, name = path.rpartition("/documents/")
    if not found:
        raise UserError(
            f"{path}: has no folder 'documents' in its path; attributes go beside it, e.g. "
            "data/documents/a.jsonl.gz and data/attributes/x/a.jsonl.gz"
        )
    if name.endswith(".parquet"):
        name = name.removesuffix(".parquet") + ".jsonl.gz"
    return f"{before}/attributes/{experiment}/{name}"


@contextmanager
def writing(path: str) -> Iterator[BinaryIO]:
    """A new file, compressed as its name says (.gz, .zst), that is there whole when the block ends
    or not at all. Its bytes depend on what is written alone. Raises UserError."""
    try:
        if storage.is_remote(path):
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder, "file")
                with open(local, "wb") as new, _compressed(new, path) as stream:
                    yield stream
                storage.upload(local, path)
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(Path(path)) as file, _compressed(file, path) as stream:
                yield stream
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror or e}") from None


@contextmanager
def _compressed(file: BinaryIO, path: str) -> Iterator[BinaryIO]:
    if path.endswith(".gz"):
        packed = gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0)
        with packed, io.BufferedWriter(cast(io.RawIOBase, packed), _BUFFER) as stream:
            yield cast(BinaryIO, stream)
    elif path.endswith((".zst", ".zstd")):
        writer = zstandard.ZstdCompressor().stream_writer(file, closefd=False)
        with writer, io.BufferedWriter(cast(io.RawIOBase, writer), _BUFFER) as buffer:
            yield cast(BinaryIO, buffer)
    else:
        yield file


def _document(line: Line, path: str) -> Document:
    try:
        if isinstance(line.content, bytes):
            return _decode_document(line.content)
        return _decode_document(encode(line.content))
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: line {line.number} is no document: {e}") from None
