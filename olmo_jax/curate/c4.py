"""The rules of C4 (Raffel et al. 2020, section 2.2) as spans of lines and flags of documents;
Dolma's names and values.

`naughty_words_en.txt` is the English "List of Dirty, Naughty, Obscene, and Otherwise Bad Words"
(Shutterstock and contributors, CC BY 4.0), as Dolma has it.
"""

from importlib import resources

from olmo_jax.curate.documents import Attributes, Document, Span

MIN_WORDS = 3
_LINE_ENDS = (".", "?", "!", '"')
_LIST = resources.files(__package__).joinpath("naughty_words_en.txt").read_text().splitlines()
_WORDS = frozenset(entry for entry in _LIST if " " not in entry)
_PHRASES = [entry for entry in _LIST if " " in entry]


def c4_v1(document: Document) -> Attributes:
    """`javascript` is a word of its own."""
    text = document.text
    lower = text.lower()
    words = lower.split()
    spans = _lines(text.split("\n"), len(text))
    flags = _flags(lower, words, "javascript" in words)
    whole = {name: [(0, len(text), 1.0)] for name in flags}
    return spans | whole | {"line_count": [(0, len(text), text.count("\n") + 1)]}


def c4_v2(document: Document) -> Attributes:
    """`javascript` may be part of a word. As in Dolma, lines are measured in the lower-cased text,
    which is longer for a few letters (U+0130)."""
    lower, n = document.text.lower(), len(document.text)
    words = lower.split()
    flags = _flags(lower, words, "javascript" in lower)
    whole: Attributes = {name: [(0, n, 1.0)] for name in flags}
    spans = _lines(lower.split("\n"), len(lower))
    return whole | spans | {"line_count": [(0, n, lower.count("\n") + 1)]}


def _lines(lines: list[str], length: int) -> Attributes:
    """The lines without punctuation at their end, and those of too few words; each span includes
    the line end."""
    unended: list[Span] = []
    short: list[Span] = []
    start = 0
    for line in lines:
        end = min(start + len(line) + 1, length)
        stripped = line.strip()
        if not stripped.endswith(_LINE_ENDS):
            unended.append((start, end, 1.0))
        if len(stripped.split(None, MIN_WORDS - 1)) < MIN_WORDS:
            short.append((start, end, 1.0))
        start = end
    spans: Attributes = {}
    if unended:
        spans["lines_with_no_ending_punctuation"] = unended
    if short:
        spans["lines_with_too_few_words"] = short
    return spans


def _flags(lower: str, words: list[str], javascript: bool) -> list[str]:
    flags = {
        "has_naughty_word": not _WORDS.isdisjoint(words) or _has_phrase(lower),
        "has_javascript": javascript,
        "has_lorem_ipsum": "lorem ipsum" in lower,
        "has_curly_brace": "{" in lower,
    }
    return [name for name, is_so in flags.items() if is_so]


def _has_phrase(lower: str) -> bool:
    return any(phrase in lower for phrase in _PHRASES)
