"""De-duplication: what has been seen before, in the order of the files and of their lines.

Three steps: workers hash each file's documents, paragraphs or n-grams; one pass over the hashes, in
order, decides; workers write attributes. So the decisions are those of one process that reads
everything in order, however many workers there are. The configuration and the attributes are those
of Dolma's deduper, with `method` (bloom, exact, minhash); `min_words` does not turn it off here.
"""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from olmo_jax import storage
from olmo_jax.curate.dedupe_config import (
    DedupeConfig,
    DeduperConfig,
    MinHashConfig,
    ParagraphConfig,
)
from olmo_jax.curate.documents import (
    Attributed,
    Attributes,
    Span,
    attributes_path,
    encode,
    find_documents,
    writing,
)
from olmo_jax.curate.duplicates import decide, load_keys
from olmo_jax.curate.executor import Advance, Executor, Shard, claim, run_shards
from olmo_jax.curate.filters import Select, compile_expression
from olmo_jax.curate.length import unicode_words
from olmo_jax.data.documents import document_id, parse_line, read_lines
from olmo_jax.errors import UserError

_SEPARATOR = "\0"
_WORD = re.compile(r"\w+")
_BEGIN = 100
"""Characters of a document that the list of clusters shows."""


def dedupe(config: DeduperConfig, executor: Executor, quiet: bool = False) -> dict[str, int]:
    """Writes an attributes file for each documents file; how many documents, items and duplicates
    there were. Raises UserError."""
    paths = find_documents(config.documents)
    outs = [attributes_path(path, config.dedupe.name) for path in paths]
    return dedupe_files(paths, outs, config, executor, quiet)


def dedupe_files(
    paths: Sequence[str],
    outs: Sequence[str],
    config: DeduperConfig,
    executor: Executor,
    quiet: bool = False,
) -> dict[str, int]:
    """The same with the attributes files named one by one."""
    settings = config.dedupe
    if settings.documents:
        compile_expression(settings.documents.key, "jsonpath")
    root = os.path.dirname(outs[0])
    if storage.is_remote(root):
        raise UserError(f"{root}: de-duplication works beside its attributes, on a local disk")
    work = os.path.join(root, ".keys")
    bloom = config.bloom_filter.model_dump(mode="json")
    facts = {"documents": list(paths), "dedupe": settings.model_dump(mode="json")}
    claim(root, settings.name, facts | {"bloom_filter": bloom})
    sizes = storage.map_files(storage.size, paths, paths)
    keys = [os.path.join(work, f"{i:06}.npz") for i in range(len(paths))]
    hashing = [
        Shard(path, key, hash_file, (path, key, settings), size, (path,))
        for path, key, size in zip(paths, keys, sizes, strict=True)
    ]
    run_shards(hashing, executor, "hashing", quiet)
    marks = [key.replace(".npz", ".marks.npy") for key in keys]
    if not _is_decided(keys, marks, config):
        clusters, before = clusters_path(outs, settings), os.path.join(work, "filter_before")
        decide(paths, keys, marks, clusters, settings, config.bloom_filter, before)
    marking = [
        Shard(path, out, write_marks, (path, key, mark, out, settings), size, (path, mark))
        for path, key, mark, out, size in zip(paths, keys, marks, outs, sizes, strict=True)
    ]
    run_shards(marking, executor, "marking", quiet)
    counts = {"units": 0, "duplicates": 0}
    for mark in marks:
        score_U = np.load(mark)
        counts["units"] += len(score_U)
        counts["duplicates"] += int((score_U >= 0).sum())
    return counts


def _is_decided(keys: Sequence[str], marks: Sequence[str], config: DeduperConfig) -> bool:
    """Whether all marks are there, none is older than what was compared, and the filter is
    written."""
    if not all(map(os.path.exists, marks)):
        return False
    written = [os.path.getmtime(mark) for mark in marks]
    if max(map(os.path.getmtime, keys)) > min(written):
        return False
    bloom = config.bloom_filter
    if config.dedupe.method != "bloom" or bloom.file is None or bloom.read_only:
        return True
    return os.path.exists(bloom.file) and os.path.getmtime(bloom.file) >= max(written)


def clusters_path(outs: Sequence[str], settings: DedupeConfig) -> str:
    """Where MinHash lists its clusters: beside the first attributes file."""
    return os.path.join(os.path.dirname(outs[0]), f"{settings.name}.clusters.jsonl")


def hash_file(path: str, out: str, settings: DedupeConfig, advance: Advance) -> None:
    """Writes the Keys of a documents file. Raises UserError."""
    digests: list[bytes] = []
    signatures: list[Any] = []
    names: list[tuple[str, str]] = []
    unit: list[int] = []
    units: list[tuple[int, int, int, bool]] = []
    done = 0
    for n, line in enumerate(read_lines(path), 1):
        row = parse_line(line, path)
        for text, start, end in _units(row, settings, path, line.number):
            is_whole = False
            if settings.method == "minhash":
                signatures.append(_signature(text, settings.minhash))
                begin = " ".join(text[:_BEGIN].split())
                names.append((document_id(row, path, line.number), begin))
            else:
                items, is_whole = _items(text, settings.paragraphs)
                digests += [xxhash.xxh3_128_digest(item.encode()) for item in items]
                unit += [len(units)] * len(items)
            units.append((line.number, start, end, is_whole))
        if n % 100 == 0:
            advance(100, line.bytes_read - done)
            done = line.bytes_read
    advance(0, storage.size(path) - done)
    if settings.method == "minhash":
        hashes: np.ndarray = np.array(signatures, np.uint32).reshape(
            -1, settings.minhash.permutations
        )
        unit = list(range(len(units)))
    else:
        hashes = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    units_U4 = np.array(units, np.int64).reshape(-1, 4)
    with writing(out) as file:
        np.savez(
            file, hashes, np.array(unit, np.int64), units_U4, np.frombuffer(encode(names), np.uint8)
        )


def write_marks(
    path: str, key: str, mark: str, out: str, settings: DedupeConfig, advance: Advance
) -> None:
    """Writes the attributes file of a documents file. Raises UserError."""
    score_U = np.load(mark)
    units_U4 = load_keys(key).units_U4
    of_line: dict[int, list[Span]] = {}
    for (number, start, end, _), score in zip(units_U4.tolist(), score_U.tolist(), strict=True):
        if score >= 0:
            of_line.setdefault(number, []).append((start, end, round(score, 5)))
    done = 0
    with writing(out) as file:
        for n, line in enumerate(read_lines(path), 1):
            row = parse_line(line, path)
            spans = of_line.get(line.number)
            attributes: Attributes = {}
            if settings.documents and spans:
                attributes = {settings.documents.attribute_name: spans}
            elif settings.paragraphs and row.get("text"):
                attributes = {settings.paragraphs.attribute_name: spans or []}
            name = document_id(row, path, line.number)
            file.write(encode(Attributed(name, attributes, row.get("source") or "")) + b"\n")
            if n % 100 == 0:
                advance(100, line.bytes_read - done)
                done = line.bytes_read
    advance(0, storage.size(path) - done)


def _units(
    row: dict[str, Any], settings: DedupeConfig, path: str, number: int
) -> Iterator[tuple[str, int, int]]:
    """What is compared in a document, with its place, without what is too short."""
    if settings.documents:
        find: Select = compile_expression(settings.documents.key, "jsonpath")
        found = find(row)
        if not found or not isinstance(found[0], str):
            raise UserError(f"{path}: line {number} has no string {settings.documents.key}")
        candidates = [(found[0], 0, len(found[0].encode()))]
    else:
        assert settings.paragraphs
        if not isinstance(row.get("text"), str):
            raise UserError(f"{path}: line {number} has no string 'text', as every document must")
        separator = settings.paragraphs.paragraph_separator
        candidates, start, n = [], 0, len(row["text"])
        for text in row["text"].split(separator) if n else []:
            end = min(start + len(text) + len(separator), n)
            candidates.append((text, start, end))
            start = end
    for text, start, end in candidates:
        if len(text) < settings.min_length or (settings.skip_empty and not text.strip()):
            continue
        if settings.min_words and len(unicode_words(text)) < settings.min_words:
            continue
        yield text, start, end


def _items(text: str, paragraphs: ParagraphConfig | None) -> tuple[list[str], bool]:
    """The text, or its n-grams; whether the last of them alone decides, the others being kept for
    the comparison with later ones."""
    ngram = paragraphs.by_ngram if paragraphs else None
    if ngram is None or not ngram.ngram_length:
        return [text], True
    words = unicode_words(text)
    n = ngram.ngram_length
    grams = []
    last = 0
    for start in range(len(words) - n + 1):
        # As in Dolma, the stride counts from the second n-gram on.
        if last == 0 or start - last >= ngram.stride:
            last = start
            grams.append(_SEPARATOR.join(words[start : start + n]))
    if len(grams) < 2 and not ngram.skip_short_paragraphs:
        return [*grams, text], True
    return grams, False


def _signature(text: str, config: MinHashConfig) -> list[int]:
    from rensa import RMinHash

    # Without punctuation: two editions of a play, one without stage directions, have 0.32 to 0.58
    # of their 5-grams in common with it, and 0.79 to 0.99 without.
    words = _WORD.findall(text.lower())
    n = config.ngram_length
    grams = {" ".join(gram) for gram in zip(*(words[k:] for k in range(n)), strict=False)}
    minhash = RMinHash(config.permutations, config.seed)
    minhash.update(sorted(grams) or [" ".join(words) or text])
    return minhash.digest()
