"""Perplexity by domain, in Paloma's form: bits per byte of each domain's documents.

A document is scored alone, after an end-of-text token, in windows of the model's length that do
not overlap; a later window begins with the last token of the one before, which it doesn't score
again (Magnusson et al. 2023).
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from olmo_jax.data.documents import parse_line, read_lines, text_field, total_bytes
from olmo_jax.errors import UserError
from olmo_jax.eval.part import Part
from olmo_jax.eval.run import fingerprint
from olmo_jax.eval.scoring import Pair, Scorer
from olmo_jax.files import write_file

RESAMPLES = 1000
_BLOCK = 256  # documents that are packed together: enough to fill rows, few enough to lose

Progress = Callable[[int, int], None]


class Document(NamedTuple):
    """What one document of a domain came to."""

    domain: str
    where: str
    """Its file's name and line."""
    nats: float
    tokens: int
    bytes: int


def evaluate(
    scorer: Scorer,
    tokenizer: Tokenizer,
    eos_id: int | None,
    paths: Sequence[str],
    *,
    name: str,
    domain_field: str = "source",
    out: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores the documents of JSONL files (also .gz and .zst) and sums up their domains; with
    `out`, a .json file, writes that whole at the end, every document's figures with it.

    On the way what is scored is kept in OUT.part: the same call goes on from there, and ends with
    the same file. Raises UserError.
    """
    if out is not None and out.suffix != ".json":
        raise UserError(f"--out={out}: give a name that ends in .json")
    with nullcontext() if out is None else Part(out, _of(scorer, paths, domain_field)) as part:
        kept = [[Document(*fields) for fields in block] for block in (part.found if part else ())]
        blocks = score_documents(
            scorer, tokenizer, eos_id, paths, domain_field, progress, skip=len(kept)
        )
        for block in blocks:
            kept.append(block)
            if part:
                part.append(block)
    documents = [document for block in kept for document in block]
    content = {
        "model": name,
        "files": [Path(path).name for path in paths],
        "domain_field": domain_field,
        "window": scorer.max_length,
        **summarize(documents, seed),
        "documents": documents,
    }
    if part and out:
        write_file(out, json.dumps(content, indent=1) + "\n")
        part.remove()
    return content


def _of(scorer: Scorer, paths: Sequence[str], domain_field: str) -> list[Any]:
    sizes = [f"{Path(path).name} {total_bytes([path])}" for path in paths]
    return [fingerprint(scorer.model, ()), scorer.max_length, domain_field, *sizes]


def score_documents(
    scorer: Scorer,
    tokenizer: Tokenizer,
    eos_id: int | None,
    paths: Sequence[str],
    domain_field: str = "source",
    progress: Progress | None = None,
    skip: int = 0,
) -> Iterator[list[Document]]:
    """Every document of the files but empty ones, in order and in blocks, without the first `skip`
    blocks.

    progress is called with (bytes read, of how many). Raises UserError for a file that cannot be
    read, a document without `text` or the domain field, and a model that has no end-of-text token.
    """
    if eos_id is None:
        raise UserError("the model names no end-of-text token, which must stand before a document")
    total = total_bytes(list(paths))
    for block in itertools.islice(_blocks(_texts(paths, domain_field)), skip, None):
        texts = [row.text for row in block]
        pairs, owners = [], []
        for n, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
            new = list(windows([eos_id, *encoding.ids], scorer.max_length))
            pairs += new
            owners += [n] * len(new)
        nats, tokens = np.zeros(len(block)), np.zeros(len(block), np.int64)
        for i, score in scorer(pairs):
            nats[owners[i]] -= score.logprob
            tokens[owners[i]] += len(pairs[i].continuation)
        yield [
            Document(
                row.domain,
                f"{Path(row.path).name}:{row.line}",
                float(nats[n]),
                int(tokens[n]),
                len(texts[n].encode()),
            )
            for n, row in enumerate(block)
        ]
        if progress:
            progress(block[-1].bytes_read, total)


class _Text(NamedTuple):
    """A line of a file that has text."""

    path: str
    line: int
    text: str
    domain: str
    bytes_read: int
    """Of all files, as they are stored."""


def _texts(paths: Sequence[str], domain_field: str) -> Iterator[_Text]:
    before = 0
    for path in paths:
        for line in read_lines(path):
            row = parse_line(line, path)
            text = text_field(row, "text", path, line.number)
            domain = text_field(row, domain_field, path, line.number)
            if text:
                yield _Text(path, line.number, text, domain, before + line.bytes_read)
        before += total_bytes([path])


def windows(ids: Sequence[int], length: int) -> Iterator[Pair]:
    """Pairs that score each id but the first once: windows of `length` inputs, side by side."""
    for start in range(0, len(ids) - 1, length):
        yield Pair((ids[start],), tuple(ids[start + 1 : start + length + 1]))


def summarize(documents: Sequence[Document], seed: int = 0) -> dict[str, Any]:
    """Figures of each domain and their averages, each with a 95 % interval.

    `domains` by name, `micro` (all documents as one domain) and `macro` (the mean of the domains'
    figures); in each `bits_per_byte` and `perplexity` (of a token), and [low, high] under
    `…_interval`: percentiles of resamples that draw as many documents of each domain as it has.
    """
    if not documents:
        raise UserError("the files have no documents with text")
    rng = np.random.default_rng(seed)
    names = sorted({document.domain for document in documents})
    rows, sums, drawn = {}, [], []
    for name in names:
        own = [document for document in documents if document.domain == name]
        values = np.array([(d.nats, d.tokens, d.bytes) for d in own], np.float64)
        sums.append(values.sum(axis=0))
        drawn.append(resampled_sums(values, rng))
        rows[name] = {"documents": len(own)} | _counts(sums[-1]) | _figures(sums[-1], drawn[-1])
    total, total_drawn = np.sum(sums, axis=0), np.sum(drawn, axis=0)
    macro: dict[str, Any] = {}
    for figure in (bits_per_byte, perplexity):
        value = np.mean([figure(s) for s in sums])
        macro |= _with_interval(figure.__name__, value, np.mean([figure(d) for d in drawn], axis=0))
    micro = {"documents": len(documents)} | _counts(total) | _figures(total, total_drawn)
    return {"domains": rows, "micro": micro, "macro": macro}


def resampled_sums(values_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sum over N rows drawn with replacement from N, RESAMPLES times: (RESAMPLES, F)."""
    n = len(values_NF)
    at_once = max(1, 10_000_000 // n)
    parts = []
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        parts.append(rng.multinomial(n, np.full(n, 1 / n), size) @ values_NF)
    return np.concatenate(parts)


def bits_per_byte(sums: np.ndarray) -> np.ndarray:
    """Of (…, 3) sums of nats, tokens and bytes."""
    return sums[..., 0] / math.log(2) / sums[..., 2]


def perplexity(sums: np.ndarray) -> np.ndarray:
    """A token's, of (…, 3) sums of nats, tokens and bytes."""
    return np.exp(np.minimum(sums[..., 0] / sums[..., 1], 700))


def _figures(sums: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for figure in (bits_per_byte, perplexity):
        out |= _with_interval(figure.__name__, figure(sums), figure(drawn))
    return out


def _with_interval(name: str, value, drawn) -> dict[str, Any]:
    return {name: float(value), f"{name}_interval": np.percentile(drawn, [2.5, 97.5]).tolist()}


def _counts(sums: np.ndarray) -> dict[str, int]:
    return {"tokens": int(sums[1]), "bytes": int(sums[2])}


def _blocks(rows: Iterator) -> Iterator[list]:
    while block := list(itertools.islice(rows, _BLOCK)):
        yield block


def table(content: dict[str, Any]) -> Table:
    """A row for each domain, then the averages, for the terminal."""
    shown = Table(box=SIMPLE_HEAD)
    for head in ("domain", "documents", "bits per byte", "95 % interval", "perplexity", "95 %"):
        shown.add_column(head, justify="left" if head == "domain" else "right")

    def add(name: str, row: dict[str, Any], **style) -> None:
        count = f"{row['documents']:,}" if "documents" in row else ""
        texts = []
        for figure, form in (("bits_per_byte", ".4f"), ("perplexity", ".2f")):
            low, high = row[f"{figure}_interval"]
            texts += [f"{row[figure]:{form}}", f"{low:{form}} to {high:{form}}"]
        shown.add_row(Text(name), count, *texts, **style)  # a str would be read as markup

    *domains, last = content["domains"].items()
    for domain in domains:
        add(*domain)
    add(*last, end_section=True)
    add("all documents (micro)", content["micro"])
    add("mean of domains (macro)", content["macro"])
    return shown
