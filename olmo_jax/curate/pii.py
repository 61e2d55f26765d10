"""E-mail addresses, telephone numbers and IP addresses by regular expression; Dolma's names, spans
and scores.

The expressions are Dolma's, as its attributes are defined by them. Each is costly where nothing
matches, so a cheap search first says where it could. (Dolma also means to leave out telephone
numbers in texts with a URL; its expression for one asks for a backspace and so never does.)
"""

import re
from collections.abc import Iterator

from olmo_jax.curate.documents import Attributes, Document, Span

_EMAIL = re.compile(r"[.\s@,?!;:)(]*([^\s@]+@[^\s@,?!;:)(]+?)[.\s@,?!;:)(]?[\s\n\r]")
_PHONE = re.compile(r"\s+\(?(\d{3})\)?[-\. ]*(\d{3})[-. ]?(\d{4})")
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
_IP = re.compile(rf"(?:{_BYTE}\.){{3}}{_BYTE}")
_MAYBE_PHONE = re.compile(r"\d{3}\)?[-. ]*\d{3}[-. ]?\d{4}")
_MAYBE_IP = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_SPACE = re.compile(r"\s")
_PUNCTUATION = re.compile(r"[.\s@,?!;:)(]*")
_BEFORE_EMAIL = frozenset(".@,?!;:)(")
_WINDOW = 100
_MAX_QUESTION_MARKS = 10_000

EMAIL, PHONE, IP = "EMAIL_ADDRESS", "PHONE_NUMBER", "IP_ADDRESS"


def pii_regex_v1(document: Document) -> Attributes:
    """`doc` is findings a word (0 for a text without words, where Dolma's v1 stops)."""
    return _with_share(document.text, empty=0.0)


def pii_regex_v2(document: Document) -> Attributes:
    """`doc` is findings a word, -1 for a text without words."""
    return _with_share(document.text, empty=-1.0)


def pii_regex_with_counts_v2(document: Document) -> Attributes:
    """`doc` as in v1, and `doc_count`, the findings."""
    text = document.text
    found = _with_share(text, empty=0.0)
    count = sum(len(spans) for name, spans in found.items() if name != "doc")
    return found | {"doc_count": [(0, len(text), count)]}


def pii_regex_with_counts_fast_v2(document: Document) -> Attributes:
    """Paragraph by paragraph. `doc_count` is the findings. `doc_frac` is their share of the
    characters plus 1, since Dolma's sum has the whole document in it, too."""
    text = document.text
    found: Attributes = {}
    if text.count("?") <= _MAX_QUESTION_MARKS:
        found = _spans(_in_paragraphs(text))
    count = sum(map(len, found.values()))
    characters = sum(end - start for spans in found.values() for start, end, _ in spans)
    share = (characters + len(text)) / len(text) if text else -1.0
    whole = (0, len(text))
    return found | {"doc_count": [(*whole, count)], "doc_frac": [(*whole, share)]}


def _with_share(text: str, empty: float) -> Attributes:
    emails = [m for m in _emails(text) if _is_address(m.group())]
    phones = _PHONE.finditer(text) if _MAYBE_PHONE.search(text) else ()
    ips = _IP.finditer(text) if _MAYBE_IP.search(text) else ()
    matches = [(EMAIL, m) for m in emails]
    for name, candidates in ((PHONE, phones), (IP, ips)):
        matches += [(name, m) for m in candidates if not _is_other_number(text, m)]
    words = len(text.split())
    share = len(matches) / words if words else empty
    spans = _spans((name, *m.span()) for name, m in matches)
    return spans | {"doc": [(0, len(text), share)]}


def _in_paragraphs(text: str) -> Iterator[tuple[str, int, int]]:
    for start, end in _paragraphs_with(text, "@"):
        for m in _emails(text[start:end]):
            before, _, domain = m.group(1).partition("@")
            if before.strip() != "(" and "." in domain:
                yield EMAIL, start + m.start(), start + m.end()
    for name, maybe, pattern in ((PHONE, _MAYBE_PHONE, _PHONE), (IP, _MAYBE_IP, _IP)):
        for start, end in _paragraphs_at(text, (m.start() for m in maybe.finditer(text))):
            for m in pattern.finditer(text[start:end]):
                yield name, start + m.start(), start + m.end()


def _emails(text: str) -> Iterator[re.Match[str]]:
    """_EMAIL.finditer(text), which takes a word's length squared. A match that begins at an @ or
    before begins in the punctuation and space before the @'s word, and ends two characters after
    the word that follows the punctuation and space behind it, at the most."""
    last = 0
    at = text.find("@")
    while at >= 0:
        start = at
        while start > last and not text[start - 1].isspace():
            start -= 1
        while start > last and (text[start - 1] in _BEFORE_EMAIL or text[start - 1].isspace()):
            start -= 1
        end = _word_end(text, at)
        after = _word_end(text, _PUNCTUATION.match(text, end).end())  # type: ignore[union-attr]
        match = _EMAIL.search(text, start, min(after + 2, len(text)))
        if match and match.start() <= at:
            yield match
            last = match.end()
        # What begins at a further @ of the same run could have begun at its first.
        run = at + 1
        while text.startswith("@", run):
            run += 1
        at = text.find("@", max(run, last))


def _word_end(text: str, at: int) -> int:
    space = _SPACE.search(text, at)
    return space.start() if space else len(text)


def _is_address(found: str) -> bool:
    before, domain = found.split("@")[:2]
    return before.strip() != "(" and "." in domain


def _is_other_number(text: str, match: re.Match[str]) -> bool:
    around = text[max(0, match.start() - _WINDOW) : match.end() + _WINDOW]
    return "isbn" in around or "doi" in around or "#" in around


def _paragraphs_with(text: str, letter: str) -> Iterator[tuple[int, int]]:
    at = text.find(letter)
    while at >= 0:
        start, end = _paragraph(text, at)
        yield start, end
        at = text.find(letter, end)


def _paragraphs_at(text: str, places: Iterator[int]) -> Iterator[tuple[int, int]]:
    end = 0
    for at in places:
        if at >= end:
            start, end = _paragraph(text, at)
            yield start, end


def _paragraph(text: str, at: int) -> tuple[int, int]:
    """The line that holds a character, with its line end."""
    return text.rfind("\n", 0, at) + 1, text.find("\n", at) + 1 or len(text)


def _spans(found: Iterator[tuple[str, int, int]]) -> Attributes:
    spans: dict[str, list[Span]] = {}
    for name, start, end in found:
        spans.setdefault(name, []).append((start, end, 1.0))
    return spans
