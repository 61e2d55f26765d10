"""Documents to token files, as Dolma's tokenizer step does it; the bytes depend on the inputs, the
tokenizer and the seed alone.

Each input is first encoded on its own, then the output files are put together from the parts: so
both steps can be spread over processes. A document is never split across files; the whole output
folder appears at the end or not at all.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from olmo_jax.data.documents import TextDocument, read_jsonl, total_bytes
from olmo_jax.data.token_files import (
    Document,
    TokenFile,
    documents_path,
    read_documents,
    smallest_dtype,
    write_documents,
    write_token_file,
)
from olmo_jax.data.tokenizer import EOS, load_tokenizer, special_token_id
from olmo_jax.errors import UserError
from olmo_jax.files import replacing

# Enough text to keep every core of a host busy in one call, at a few tens of MB of memory.
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 4 << 20, 1024

Advance = Callable[[int, int], None]
"""Called with the documents and bytes of input done since the last call."""


class Job(NamedTuple):
    """A piece of work: `call(*arguments, advance)` writes the file `out`, whole or not at all."""

    name: str
    out: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    size: int
    """Bytes of input."""


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
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    run: Callable[[list[Job]], object] | None = None,
) -> Tokenized:
    """Write `out_dir`/part-00000.npy, … with their .csv.gz from documents (see `data.documents`).

    Each text is stripped (as Dolma does; not with strip=False), skipped when empty, encoded, and
    ended with `eos_token` unless it ends with it already. The files have as equal sizes as whole
    documents allow and at most `max_tokens_per_file`; a longer document gets a file of its own.
    The type is the smallest that holds the vocabulary. Documents keep their order, or with a `seed`
    are shuffled over all files. `progress(done, total)` counts input bytes. `run` carries out jobs
    in any order, leaving those whose `out` is there; what it has done is then kept beside `out_dir`
    for the next call, when one fails. Raises UserError for a file that cannot be read, a token that
    the tokenizer lacks, or an `out_dir` that is not empty.
    """
    inputs, out_dir = list(inputs), Path(out_dir)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    eos = special_token_id(tokenizer, eos_token)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir}: is not an empty folder; give a new one for the token files")
    # The name says what the parts depend on: what another call left is not taken.
    facts = (tokenizer.to_str(), eos, strip, max_tokens_per_file, seed)
    sizes = [total_bytes([path]) for path in inputs]
    key = hashlib.sha256(repr((facts, inputs)).encode()).hexdigest()[:12]
    parts = out_dir.with_name(f".{out_dir.name}.{key}.parts")
    unfinished = out_dir.with_name(f".{out_dir.name}.{key}.tmp")
    try:
        dtype = smallest_dtype(tokenizer.get_vocab_size())
        # One thread in each of several processes; all cores for a single file.
        encode = partial(_encode_file, tokenizer.to_str(), eos, strip, len(inputs) == 1 or not run)
        names = [str(parts / f"{i:06}-{size}.npy") for i, size in enumerate(sizes)]
        jobs = [
            Job(path, name, encode, (path, name, dtype), size)
            for path, name, size in zip(inputs, names, sizes, strict=True)
        ]
        (run or partial(_run_here, progress=progress, total=sum(sizes)))(jobs)
        rows = [read_documents(documents_path(name)) or [] for name in names]
        skipped = sum(sum(row.end == row.start for row in part) for part in rows)
        groups = _groups(rows, max_tokens_per_file, seed)
        if not groups:
            raise UserError(f"no text in {', '.join(inputs) or 'no inputs'}; nothing written")
        outs = [str(unfinished / f"part-{i:05}.npy") for i in range(len(groups))]
        writing = [
            Job(out, out, _write_file, (names, group, out, dtype), 0)
            for out, group in zip(outs, groups, strict=True)
        ]
        (run or _run_here)(writing)
        os.replace(unfinished, out_dir)
        shutil.rmtree(parts)
    except OSError as e:
        raise UserError(f"{out_dir}: cannot be written: {e.strerror}") from None
    finally:
        if run is None:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(parts, ignore_errors=True)
    width = np.dtype(dtype).itemsize
    paths = [out_dir / Path(out).name for out in outs]
    files = [TokenFile(str(path), dtype, path.stat().st_size // width) for path in paths]
    documents = sum(map(len, groups))
    return Tokenized(files, documents, sum(f.size for f in files), skipped, eos)


def _run_here(
    jobs: list[Job], progress: Callable[[int, int], None] | None = None, total: int = 0
) -> None:
    done = 0

    def advance(documents: int, n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(done, total)

    for job in jobs:
        job.call(*job.arguments, advance)


@lru_cache(maxsize=1)
def _tokenizer(content: str) -> Tokenizer:
    """One for all files of a process: each new one leaves 4 MB behind (tokenizers 0.23.3)."""
    return Tokenizer.from_str(content)


def _encode_file(
    tokenizer_json: str,
    eos: int,
    strip: bool,
    threads: bool,
    path: str,
    out: str,
    dtype: str,
    advance: Advance,
) -> None:
    """Writes one input's tokens; a document that is skipped is a row without tokens."""
    if not threads:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = _tokenizer(tokenizer_json)
    rows: list[Document] = []
    done = end = 0
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(out)) as file:
        for batch in _batches(path):
            texts = [d.text.strip() if strip else d.text for d in batch]
            kept = [text for text in texts if text]
            encodings = iter(tokenizer.encode_batch_fast(kept, add_special_tokens=False))
            for document, text in zip(batch, texts, strict=True):
                ids = next(encodings).ids if text else []
                if text and ids[-1:] != [eos]:
                    ids.append(eos)
                file.write(np.array(ids, dtype).tobytes())
                rows.append(Document(end, end + len(ids), document.id, path, document.line))
                end += len(ids)
            advance(len(batch), batch[-1].bytes_read - done)
            done = batch[-1].bytes_read
        write_documents(out, rows)
    advance(0, total_bytes([path]) - done)


def _groups(
    rows: list[list[Document]], max_tokens: int, seed: int | None
) -> list[list[tuple[int, Document]]]:
    """The documents of each output file, with the number of the part that each is in."""
    kept = [(i, row) for i, part in enumerate(rows) for row in part if row.end > row.start]
    if seed is not None:
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(kept))
        kept = [kept[k] for k in order]
    ends = np.cumsum([row.end - row.start for _, row in kept])
    if not kept:
        return []
    # The smallest limit that takes no more files than `max_tokens` does.
    files, low, high = len(_cuts(ends, max_tokens)), 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cuts(ends, middle)) <= files else (middle + 1, high)
    cuts = _cuts(ends, high)
    return [kept[a:b] for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]


def _cuts(ends: np.ndarray, limit: int) -> list[int]:
    """Where files end when each takes as many documents as fit, but one at least."""
    cuts: list[int] = []
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        start = max(int(np.searchsorted(ends, before + limit, side="right")), start + 1)
        cuts.append(start)
    return cuts


def _write_file(
    parts: list[str],
    group: list[tuple[int, Document]],
    out: str,
    dtype: str,
    advance: Advance,
) -> None:
    open_parts = {i: np.memmap(parts[i], dtype, mode="r") for i in {i for i, _ in group}}
    tokens = np.concatenate([open_parts[i][row.start : row.end] for i, row in group])
    rows, start = [], 0
    for _, row in group:
        end = start + row.end - row.start
        rows.append(row._replace(start=start, end=end))
        start = end
    write_token_file(out, tokens, rows, dtype)


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
