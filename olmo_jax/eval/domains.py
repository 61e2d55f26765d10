"""Perplexity by domain, in Paloma's form: bits per byte of each domain's documents.

A document is scored alone, after an end-of-text token, in windows of the model's length that do
not overlap; a later window begins with the last token of the one before, which it doesn't score
again (Magnusson et al. 2023).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from olmo_jax.data.documents import read_rows, total_bytes
from olmo_jax.errors import UserError
from olmo_jax.eval.scoring import Pair, Scorer

RESAMPLES = 1000
_BLOCK = 1024  # documents that are packed together: enough to fill rows, few enough to hold


class Document(NamedTuple):
    """What one document of a domain came to."""

    domain: str
    where: str
    """Its file's name and line."""
    nats: float
    tokens: int
    bytes: int


def score_documents(
    scorer: Scorer,
    tokenizer: Tokenizer,
    eos_id: int | None,
    paths: Sequence[str],
    domain_field: str = "source",
    progress: Callable[[int, int], None] | None = None,
    skip: int = 0,
) -> Iterator[Document]:
    """Every document of the files but empty ones and the first `skip`, in order.

    progress is called with (bytes read, of how many). Raises UserError for a file that cannot be
    read, a document without `text` or the domain field, and a model that has no end-of-text token.
    """
    if eos_id is None:
        raise UserError("the model names no end-of-text token, which must stand before a document")
    total, before = total_bytes(list(paths)), 0
    for path in paths:
        rows = (r for r in read_rows(path, ("text", domain_field)) if r.fields["text"])
        for block in _blocks(itertools.islice(rows, skip, None), _BLOCK):
            texts = [row.fields["text"] for row in block]
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
            pairs, owners = [], []
            for n, encoding in enumerate(encoded):
                new = list(windows([eos_id, *encoding.ids], scorer.max_length))
                pairs += new
                owners += [n] * len(new)
            nats, tokens = np.zeros(len(block)), np.zeros(len(block), np.int64)
            for i, score in scorer(pairs):
                nats[owners[i]] -= score.logprob
                tokens[owners[i]] += len(pairs[i].continuation)
            for n, row in enumerate(block):
                size = len(texts[n].encode())
                where = f"{Path(path).name}:{row.line}"
                domain = row.fields[domain_field]
                yield Document(domain, where, float(nats[n]), int(tokens[n]), size)
            if progress:
                progress(before + block[-1].bytes_read, total)
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
    macro = {}
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
    out = {}
    for figure in (bits_per_byte, perplexity):
        out |= _with_interval(figure.__name__, figure(sums), figure(drawn))
    return out


def _with_interval(name: str, value, drawn) -> dict[str, Any]:
    return {name: float(value), f"{name}_interval": np.percentile(drawn, [2.5, 97.5]).tolist()}


def _counts(sums: np.ndarray) -> dict[str, int]:
    return {"tokens": int(sums[1]), "bytes": int(sums[2])}


def _blocks(rows: Iterator, size: int) -> Iterator[list]:
    while block := list(itertools.islice(rows, size)):
        yield block
