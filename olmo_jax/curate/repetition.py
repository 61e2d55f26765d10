"""Characters and tokens that are repeated over and over; Dolma's names and values."""

import re
from collections.abc import Iterator

from olmo_jax.curate.documents import Attributes, Document, Span
from olmo_jax.curate.length import paragraphs

_REPEATED = re.compile(r"(.+?)(\s?\1){3,}")


def repetitions_v1(document: Document) -> Attributes:
    """Groups of characters that are there four times in a row or more, and what share of the
    document they are. Slow: it looks for groups of any length."""
    return _with_totals(list(_repetitions(document.text, 0)), document.text)


def paragraph_repetitions_v1(document: Document) -> Attributes:
    """The same within paragraphs."""
    text = document.text
    spans = [
        span
        for start, end in paragraphs(text, with_empty=True)
        for span in _repetitions(text[start:end], start)
    ]
    return _with_totals(spans, text)


def _repetitions(text: str, offset: int) -> Iterator[Span]:
    for match in _REPEATED.finditer(text):
        times = match.group().count(match.group(1))
        yield offset + match.start(), offset + match.end(), times


def _with_totals(spans: list[Span], text: str) -> Attributes:
    lengths = [end - start for start, end, _ in spans]
    n = len(text)
    found: Attributes = {"repetition": spans} if spans else {}
    return found | {
        "doc_max_score_repetition": [(0, n, max((score for _, _, score in spans), default=0))],
        "doc_max_length_repetition": [(0, n, max(lengths, default=0))],
        "doc_frac_repetition": [(0, n, sum(lengths) / n if spans else 0)],
    }
