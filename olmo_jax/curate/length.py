"""How long a document is and its paragraphs are, by several measures; Dolma's names and values."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import regex

from olmo_jax.curate.documents import Attributes, Document, Span

# Unicode's word boundaries (UAX 29), which `regex` finds with WORD, but in version 2026.11.15 not
# the one after an apostrophe that begins a word ('On).
_WORD_BOUNDARY = regex.compile(
    r"\b|(?<=(?<![\p{Alphabetic}\p{M}\p{Cf}])['\u2019])(?=\p{Alphabetic})",
    regex.WORD | regex.VERSION1,
)
_WORDS_AND_SIGNS = regex.compile(r"\w+|[^\w\s]+")


def paragraphs(text: str, with_empty: bool = False) -> Iterator[tuple[int, int]]:
    """Lines with their line ends; those of space alone are left out unless `with_empty`."""
    start = 0
    for line in text.split("\n"):
        end = min(start + len(line) + 1, len(text))
        if end > start and (with_empty or not (line.isspace() or not line)):
            yield start, end
        start = end


def measure(name: str, count: Callable[[str], int]) -> Callable[[Document], Attributes]:
    """A tagger of one number for a document."""
    return lambda document: {name: [(0, len(document.text), count(document.text))]}


def with_paragraphs(count: Callable[[str], int], total: bool) -> Callable[[Document], Attributes]:
    """A tagger of a number for each paragraph, and for the document: their total or its own."""

    def tag(document: Document) -> Attributes:
        text = document.text
        spans: list[Span] = [(s, e, count(text[s:e])) for s, e in paragraphs(text)]
        whole = sum(score for _, _, score in spans) if total else count(text)
        found: Attributes = {"paragraph": spans} if spans else {}
        return found | {"document": [(0, len(text), whole)]}

    return tag


def uniseg_paragraphs(with_empty: bool, with_document: bool) -> Callable[[Document], Attributes]:
    """A tagger of each paragraph's Unicode words, and the same negative for `>=` in a filter."""

    def tag(document: Document) -> Attributes:
        text = document.text
        spans: list[Span] = [(s, e, words(text[s:e])) for s, e in paragraphs(text, with_empty)]
        found: Attributes = {}
        if spans:
            found = {"paragraph": spans, "negative_paragraph": [(s, e, -n) for s, e, n in spans]}
        if with_document:
            total = sum(n for _, _, n in spans)
            found["document"] = [(0, len(text), total)]
            found["negative_document"] = [(0, len(text), -total)]
        return found

    return tag


def byte_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def stripped_length(text: str) -> int:
    return len(text.strip())


def words_and_signs(text: str) -> int:
    """Pieces between runs of letters and runs of signs: one more than the runs."""
    return sum(1 for _ in _WORDS_AND_SIGNS.finditer(text)) + 1


def segments(text: str) -> int:
    """Unicode words of the stripped text, with the space between them."""
    boundaries = sum(1 for _ in _WORD_BOUNDARY.finditer(text.strip()))
    return max(boundaries - 1, 0)


def words(text: str) -> int:
    """Unicode words of the text that are not space."""
    return len(unicode_words(text))


def unicode_words(text: str) -> list[str]:
    """The text cut at Unicode's word boundaries, without the pieces of space."""
    ends = [m.start() for m in _WORD_BOUNDARY.finditer(text)]
    return [word for s, e in pairwise(ends) if not (word := text[s:e]).isspace()]
