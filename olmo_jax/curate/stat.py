"""What is in the documents: counts by source, lengths, domains, n-grams, duplicates, attributes.

A shard for each file writes what it found; the findings are merged in the order of the files, so
that they do not depend on the number of workers. `stat_page` shows them to people.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash
import zstandard

from olmo_jax import storage
from olmo_jax.curate.blocklists import host, url_of
from olmo_jax.curate.documents import (
    Attributes,
    Document,
    attributes_path,
    encode,
    find_documents,
    read_attributes,
    read_documents,
    writing,
)
from olmo_jax.curate.executor import Advance, Executor, Shard, claim, run_shards
from olmo_jax.curate.frequent import Frequent, most_frequent, ngram_counts
from olmo_jax.curate.histogram import Histogram
from olmo_jax.curate.repeats import Runs, compare_part, part_bits
from olmo_jax.data.tokenizer import load_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.files import replacing, write_bytes

NGRAMS = (1, 2, 3, 10)
"""Words of the n-grams that are counted, those of "What's In My Big Data?" (Elazar et al., 2024)"""
TOP = 100
KINDS = ("documents", "paragraphs")
MAX_SOURCES = 1000
"""More are counted together, as OTHERS."""
NO_SOURCE, OTHERS = "(none)", "(other sources)"
_CHUNK_WORDS = 1 << 20
_SNIPPET = 160
_COUNTS = ("documents", "empty", "bytes", "characters", "words", "tokens", "paragraphs")
_LANGUAGE_TAGGERS = ("cld2", "fasttext")


class Settings(NamedTuple):
    """What is counted beside the text."""

    attributes: tuple[str, ...] = ()
    """Experiments; those of documents/a.jsonl.gz are in attributes/<experiment>/a.jsonl.gz."""
    tokenizer: str | None = None


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
    write_bytes(out, json.dumps(found, indent=1).encode())
    return found


def _stat(
    paths: list[str], work: Path, settings: Settings, executor: Executor, quiet: bool
) -> dict[str, Any]:
    claim(str(work), "stat", settings._asdict())
    sizes = storage.map_files(storage.size, paths, paths)
    outs = [str(work / f"{xxhash.xxh3_128_hexdigest(path.encode())}.json.zst") for path in paths]
    shards = []
    for path, out, size in zip(paths, outs, sizes, strict=True):
        made = (attributes_path(path, name) for name in settings.attributes)
        sources = (path, *made)
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
        chunk = _Chunk(findings, {"documents": Runs(documents), "paragraphs": Runs(paragraphs)})
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


class Findings:
    """All that is counted, in bounded memory; of one file, and merged, of many."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.sources: dict[str, dict[str, int]] = {}
        self.lengths: dict[str, Histogram] = {}
        """Words of the documents of each source."""
        self.frequent: dict[str, Frequent] = {name: Frequent() for name in ("domains", *KINDS)}
        self.frequent |= {f"{n}-grams": Frequent() for n in NGRAMS}
        self.scores: dict[str, Histogram] = {}
        self.spans: dict[str, Histogram] = {}
        self.having: Counter[str] = Counter()
        """Documents that have spans of an attribute."""
        self.labels: dict[str, dict[str, list[int]]] = {}
        """For each tagger of languages, label to documents and characters."""

    def add_source(self, name: str, counts: dict[str, int], words: Sequence[int]) -> None:
        name = name if name in self.sources or len(self.sources) < MAX_SOURCES else OTHERS
        row = self.sources.setdefault(name, dict.fromkeys(_COUNTS, 0))
        for what, n in counts.items():
            row[what] += n
        self.lengths.setdefault(name, Histogram()).add(words)

    def add_attributes(self, attributes: Attributes, characters: int) -> None:
        best: dict[str, tuple[float, str]] = {}
        for name, spans in attributes.items():
            self.scores.setdefault(name, Histogram()).add([score for *_, score in spans])
            self.spans.setdefault(name, Histogram()).add([end - start for start, end, _ in spans])
            self.having[name] += bool(spans)
            tagger, _, label = name.rpartition("__")
            is_whole = len(spans) == 1 and spans[0][:2] == (0, characters)
            if is_whole and tagger.partition("__")[2].startswith(_LANGUAGE_TAGGERS):
                found = (spans[0][2], label.removeprefix("doc_"))
                best[tagger] = max(best.get(tagger, found), found)
        for tagger, (_, label) in best.items():
            row = self.labels.setdefault(tagger, {}).setdefault(label, [0, 0])
            row[0] += 1
            row[1] += characters

    def content(self) -> dict[str, Any]:
        """For a file."""
        return {
            "sources": self.sources,
            "lengths": {name: h.content() for name, h in self.lengths.items()},
            "frequent": {name: f.content() for name, f in self.frequent.items()},
            "scores": {name: h.content() for name, h in self.scores.items()},
            "spans": {name: h.content() for name, h in self.spans.items()},
            "having": self.having,
            "labels": self.labels,
        }

    def merge(self, content: dict[str, Any]) -> None:
        """Adds what `content` gave."""
        for name, counts in content["sources"].items():
            self.add_source(name, counts, ())
            known = name if name in self.sources else OTHERS
            self.lengths[known].merge(content["lengths"][name])
        for name, frequent in self.frequent.items():
            frequent.merge(content["frequent"][name])
        for mine, theirs in ((self.scores, content["scores"]), (self.spans, content["spans"])):
            for name, histogram in theirs.items():
                mine.setdefault(name, Histogram()).merge(histogram)
        self.having.update(content["having"])
        for tagger, labels in content["labels"].items():
            rows = self.labels.setdefault(tagger, {})
            for label, counts in labels.items():
                rows[label] = [a + b for a, b in zip(rows.get(label, (0, 0)), counts, strict=True)]

    def summary(self) -> dict[str, Any]:
        """For people and machines."""
        total = {what: sum(row[what] for row in self.sources.values()) for what in _COUNTS}
        everything = Histogram()
        for histogram in self.lengths.values():
            everything.merge(histogram.content())
        found: dict[str, Any] = {
            "total": total | {"words_of_a_document": everything.summary()},
            "sources": {
                name: row | {"words_of_a_document": self.lengths[name].summary()}
                for name, row in sorted(self.sources.items(), key=lambda pair: -pair[1]["bytes"])
            },
            "domains": self.frequent["domains"].top(TOP),
            "ngrams": {str(n): self.frequent[f"{n}-grams"].top(TOP) for n in NGRAMS},
            "duplicates": {},
            "attributes": {
                name: {
                    "documents": self.having[name],
                    "score": self.scores[name].summary(),
                    "length": self.spans[name].summary(),
                }
                for name in sorted(self.scores)
            },
            "languages": self.labels,
        }
        for kind in KINDS:
            top = self.frequent[kind].top(TOP)
            for item in top["items"]:  # without the hash, which kept equal beginnings apart
                item["item"] = item["item"].partition(" ")[2]
            top["items"] = [item for item in top["items"] if item["at_most"] > 1]
            found["duplicates"][kind] = {"most_repeated": top}
        if not self._settings.tokenizer:
            for row in (total, found["total"], *found["sources"].values()):
                row.pop("tokens", None)
        return found


class _Chunk:
    """Documents that are counted at once, a million words."""

    def __init__(self, findings: Findings, runs: dict[str, Runs]):
        self._findings = findings
        self._runs = runs
        self._start()

    def _start(self) -> None:
        self._words: list[str] = []
        self._n_words: list[int] = []
        self._texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self._hashes: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self._domains: Counter[str] = Counter()
        self._sources: dict[str, tuple[Counter[str], list[int]]] = {}

    def add(self, document: Document, tokens: int) -> None:
        text = document.text
        raw = text.encode()
        words = text.split()
        self._words += words
        self._n_words.append(len(words))
        paragraphs = [stripped for line in text.split("\n") if (stripped := line.strip())]
        self._texts["paragraphs"] += paragraphs
        self._hashes["paragraphs"] += [xxhash.xxh3_64_intdigest(p.encode()) for p in paragraphs]
        if words:  # empty ones are counted apart
            self._texts["documents"].append(f"{document.id}: {text[:_SNIPPET]}")
            self._hashes["documents"].append(xxhash.xxh3_64_intdigest(raw))
        if url := url_of(document):
            self._domains[host(url).removeprefix("www.") or "(no host)"] += 1
        counts, lengths = self._sources.setdefault(document.source or NO_SOURCE, (Counter(), []))
        measured = (1, not words, len(raw), len(text), len(words), tokens, len(paragraphs))
        counts.update(dict(zip(_COUNTS, measured, strict=True)))
        lengths.append(len(words))
        if len(self._words) >= _CHUNK_WORDS:
            self._count()

    def close(self) -> dict[str, list[int]]:
        """Counts the rest; the lengths of the runs."""
        self._count()
        for runs in self._runs.values():
            runs.close()
        return {kind: runs.lengths for kind, runs in self._runs.items()}

    def _count(self) -> None:
        findings = self._findings
        document_W = np.repeat(np.arange(len(self._n_words)), self._n_words)
        for n, counted in ngram_counts(self._words, document_W, NGRAMS).items():
            findings.frequent[f"{n}-grams"].add(*counted)
        for kind in KINDS:
            hashes = np.array(self._hashes[kind], np.uint64)
            self._runs[kind].add(hashes)
            first, counts, bound = most_frequent(hashes)
            items = _snippets(self._texts[kind], hashes, first)
            found = {item: (n, 0) for item, n in zip(items, counts.tolist(), strict=True)}
            findings.frequent[kind].add(found, len(hashes), bound)
        domains = {name: (n, 0) for name, n in self._domains.items()}
        findings.frequent["domains"].add(domains, self._domains.total())
        for name, (counts_of, lengths) in self._sources.items():
            findings.add_source(name, counts_of, lengths)
        self._start()


def _snippets(texts: list[str], hashes: np.ndarray, first: np.ndarray) -> Iterator[str]:
    for at in first.tolist():
        yield f"{int(hashes[at]):016x} {' '.join(texts[at][:_SNIPPET].split())}"


def _hashes_path(out: str, kind: str) -> str:
    return out.replace(".json.zst", f".{kind}.u64")


def _read(path: str) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(Path(path).read_bytes())
    except (OSError, zstandard.ZstdError) as e:
        raise UserError(f"{path}: cannot be read: {e}; remove {os.path.dirname(path)}") from None
