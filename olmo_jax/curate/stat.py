"""What is in the documents: counts by source, lengths, domains, n-grams, duplicates, attributes.

A shard for each file writes what it found; the findings are merged in the order of the files, so
that they do not depend on the number of workers. `stat_page` shows them to people.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import xxhash
import zstandard

from olmo_jax import storage
from olmo_jax.curate.documents import (
    attributes_path,
    encode,
    find_documents,
    read_attributes,
    read_documents,
    writing,
)
from olmo_jax.curate.executor import Advance, Executor, Shard, claim, run_shards
from olmo_jax.curate.findings import KINDS, Chunk, Findings, Settings
from olmo_jax.curate.histogram import Histogram
from olmo_jax.curate.repeats import Runs, compare_part, part_bits
from olmo_jax.data.tokenizer import load_tokenizer, tokenizer_file
from olmo_jax.errors import UserError
from olmo_jax.files import replacing, write_file


def stat(
    documents: Sequence[str],
    out: Path | None,
    settings: Settings,
    executor: Executor,
    quiet: bool = False,
) -> dict[str, Any]:
    """What is in the documents. With `out`, that is written there as JSON, and the findings of each
    file are kept in a folder beside it, so that the same call again does what is left. Raises
    UserError."""
    paths = find_documents(documents)
    if settings.tokenizer:
        load_tokenizer(settings.tokenizer)  # a mistake comes out before any work
    if out is None:
        folder = tempfile.mkdtemp()
        try:
            return _stat(paths, Path(folder), settings, executor, quiet)
        finally:
            shutil.rmtree(folder)
    if storage.is_remote(out):
        raise UserError(f"{out}: must be a file of this machine, beside which findings are kept")
    found = _stat(paths, out.with_suffix(".parts"), settings, executor, quiet)
    write_file(out, json.dumps(found, indent=1))
    return found


def _stat(
    paths: list[str], work: Path, settings: Settings, executor: Executor, quiet: bool
) -> dict[str, Any]:
    claim(str(work), "stat", settings._asdict())
    sizes = storage.map_files(storage.size, paths, paths)
    outs = [str(work / f"{xxhash.xxh3_128_hexdigest(path.encode())}.json.zst") for path in paths]
    tokenizer = [tokenizer_file(settings.tokenizer)] if settings.tokenizer else []
    shards = []
    for path, out, size in zip(paths, outs, sizes, strict=True):
        made = (attributes_path(path, name) for name in settings.attributes)
        sources = (path, *made, *tokenizer)
        shards.append(Shard(path, out, stat_file, (path, out, settings), size, sources))
    run_shards(shards, executor, "counting", quiet)
    totals = Findings(settings)
    runs: dict[str, list[tuple[str, list[int]]]] = {kind: [] for kind in KINDS}
    for out in outs:
        content = msgspec.json.decode(_read(out))
        totals.merge(content)
        for kind in KINDS:
            runs[kind].append((_hashes_path(out, kind), content["runs"][kind]))
    found = totals.summary()
    found["files"] = len(paths)
    found["stored_bytes"] = sum(sizes)
    for kind in KINDS:
        sizes_of = _compare(kind, runs[kind], outs, work, executor, quiet)
        found["duplicates"][kind] |= {
            "different": sizes_of.count,
            "repeats": int(sizes_of.sum) - sizes_of.count,
            "times": sizes_of.summary(),
        }
    return found


def _compare(
    kind: str,
    runs: list[tuple[str, list[int]]],
    outs: list[str],
    work: Path,
    executor: Executor,
    quiet: bool,
) -> Histogram:
    """How many items are there how often."""
    total = sum(sum(lengths) for _, lengths in runs)
    bits = part_bits(total)
    name = xxhash.xxh3_64_hexdigest("\n".join(outs).encode())
    shards = []
    for part in range(1 << bits):
        out = str(work / f"{name}.{kind}.{part}-{bits}.json")
        arguments = (runs, part, bits, out)
        label = f"part {part} of the {kind}"
        size = total * 8 >> bits
        shards.append(Shard(label, out, compare_part, arguments, size, tuple(outs)))
    run_shards(shards, executor, f"comparing {kind}", quiet)
    merged = Histogram()
    for shard in shards:
        merged.merge(json.loads(Path(shard.out).read_bytes()))
    return merged


def stat_file(path: str, out: str, settings: Settings, advance: Advance) -> None:
    """Writes the findings of a documents file. Raises UserError."""
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    findings = Findings(settings)
    files = [
        (name, read_attributes(name))
        for name in (attributes_path(path, experiment) for experiment in settings.attributes)
    ]
    done = n = 0
    first, second = (Path(_hashes_path(out, kind)) for kind in KINDS)
    with replacing(first) as documents, replacing(second) as paragraphs:
        chunk = Chunk(findings, {"documents": Runs(documents), "paragraphs": Runs(paragraphs)})
        for n, (document, line) in enumerate(read_documents(path), 1):
            text = document.text
            tokens = len(tokenizer.encode(text, add_special_tokens=False)) if tokenizer else 0
            chunk.add(document, tokens)
            for file, lines in files:
                if (row := next(lines, None)) is None or row.id != document.id:
                    raise UserError(
                        f"{file}: line {n} is not of {document.id!r}, as line {line.number} of "
                        f"{path} is; tag it again"
                    )
                findings.add_attributes(row.attributes, len(text))
            if n % 100 == 0:
                advance(100, line.bytes_read - done)
                done = line.bytes_read
        for file, lines in files:
            if next(lines, None) is not None:
                raise UserError(f"{file}: goes on where {path} has ended; tag it again")
        runs = chunk.close()
    advance(n % 100, storage.size(path) - done)
    with writing(out) as file_:
        file_.write(encode(findings.content() | {"runs": runs}))


def _hashes_path(out: str, kind: str) -> str:
    return out.replace(".json.zst", f".{kind}.u64")


def _read(path: str) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(Path(path).read_bytes())
    except (OSError, zstandard.ZstdError) as e:
        raise UserError(f"{path}: cannot be read: {e}; remove {os.path.dirname(path)}") from None
