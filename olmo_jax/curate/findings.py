"""What `stat` counts, of one file and merged of many, in bounded memory."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from olmo_jax.curate.blocklists import host, url_of
from olmo_jax.curate.documents import Attributes, Document
from olmo_jax.curate.frequent import Frequent, most_frequent, ngram_counts
from olmo_jax.curate.histogram import Histogram
from olmo_jax.curate.repeats import Runs

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


class Chunk:
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
            self._texts["documents"].append(text[:_SNIPPET])
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
