"""Documents to token files, as Dolma's tokenizer step does it: one pass, deterministic.

A document is never split across files; the whole output folder appears at the end or not at all.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from olmo_jax.data.documents import TextDocument, read_jsonl, total_bytes
from olmo_jax.data.token_files import Document, TokenFile, smallest_dtype, write_token_file
from olmo_jax.data.tokenizer import EOS, load_tokenizer, special_token_id
from olmo_jax.errors import UserError

# Enough text to keep every core of a host busy in one call, at a few tens of MB of memory.
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 4 << 20, 1024


class Tokenized(NamedTuple):
    """What was written: for the report and for DataConfig."""

    files: list[TokenFile]
    documents: int
    tokens: int
    skipped: int
    """Documents that were empty after stripping."""
    eos_token_id: int


def tokenize_documents(
    inputs: Sequence[str],
    out_dir: str | Path,
    tokenizer: Tokenizer | str | Path,
    *,
    eos_token: str = EOS,
    strip: bool = True,
    max_tokens_per_file: int = 1 << 26,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenized:
    """Write `out_dir`/part-00000.npy, … with their .csv.gz from JSONL documents (.gz, .zst too).

    Each text is stripped (as Dolma does; not with strip=False), skipped when empty, encoded, and
    ended with `eos_token` unless it ends with it already. A new file starts before the document
    that would take it past `max_tokens_per_file`; a longer document gets a file of its own. The
    type is the smallest that holds the vocabulary. `progress(done, total)` counts input bytes.
    Raises UserError for a file that cannot be read, a token that the tokenizer lacks, or an
    `out_dir` that is not empty.
    """
    inputs, out_dir = list(inputs), Path(out_dir)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    eos = special_token_id(tokenizer, eos_token)
    total = total_bytes(inputs)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir}: is not an empty folder; give a new one for the token files")
    unfinished = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    try:
        dtype = smallest_dtype(tokenizer.get_vocab_size())
        writer = _Writer(unfinished, dtype, max_tokens_per_file)
        skipped = before = 0
        for path in inputs:
            for batch in _batches(path):
                texts = [d.text.strip() if strip else d.text for d in batch]
                kept = [d for d, text in zip(batch, texts, strict=True) if text]
                skipped += len(batch) - len(kept)
                encodings = tokenizer.encode_batch_fast(
                    [text for text in texts if text], add_special_tokens=False
                )
                for document, encoding in zip(kept, encodings, strict=True):
                    ids = encoding.ids if encoding.ids[-1:] == [eos] else [*encoding.ids, eos]
                    writer.add(ids, document.id, path, document.line)
                if progress:
                    progress(before + batch[-1].bytes_read, total)
            before += total_bytes([path])
        writer.close()
        if not writer.files:
            raise UserError(f"no text in {', '.join(inputs) or 'no inputs'}; nothing written")
        os.replace(unfinished, out_dir)
    except OSError as e:
        raise UserError(f"{out_dir}: cannot be written: {e.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    files = [TokenFile(str(out_dir / Path(f.path).name), f.dtype, f.size) for f in writer.files]
    return Tokenized(files, writer.documents, sum(f.size for f in files), skipped, eos)


class _Writer:
    """Gathers documents and writes a file when the next would not fit."""

    def __init__(self, folder: Path, dtype: str, max_tokens: int):
        self.files: list[TokenFile] = []
        self.documents = 0
        self._folder, self._dtype, self._max_tokens = folder, dtype, max_tokens
        self._arrays: list[np.ndarray] = []
        self._rows: list[Document] = []
        self._end = 0

    def add(self, ids: list[int], name: str, src: str, line: int) -> None:
        if self._end and self._end + len(ids) > self._max_tokens:
            self.close()
        start, self._end = self._end, self._end + len(ids)
        self._arrays.append(np.array(ids, self._dtype))
        self._rows.append(Document(start, self._end, name, src, line))
        self.documents += 1

    def close(self) -> None:
        """Write what is gathered, if anything."""
        if self._rows:
            path = self._folder / f"part-{len(self.files):05d}.npy"
            tokens = np.concatenate(self._arrays)
            self.files.append(write_token_file(path, tokens, self._rows, self._dtype))
        self._arrays, self._rows, self._end = [], [], 0


def _batches(path: str) -> Iterator[list[TextDocument]]:
    batch: list[TextDocument] = []
    characters = 0
    for document in read_jsonl(path):
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
