"""The quality rules of Gopher (Rae et al. 2021, appendix A) as numbers; Dolma's names and values.

Words are numbered once and n-grams are counted on arrays of numbers; only what is repeated at
length n can be repeated at n + 1, so the longer ones cost next to nothing.
"""

import re
from collections import Counter

import numpy as np

from olmo_jax.curate.documents import Attributes, Document

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
MOST_COMMON = (2, 3, 4)
LONGEST = 10
_LINE_ENDS = re.compile("\n+")


def gopher_v1(document: Document) -> Attributes:
    """Lines end at each line end."""
    return _attributes(document.text, skip_empty_lines=False)


def gopher_v2(document: Document) -> Attributes:
    """Several line ends in a row count as one."""
    return _attributes(document.text, skip_empty_lines=True)


def _attributes(text: str, skip_empty_lines: bool) -> Attributes:
    words = text.split()
    scores = dict(_ngrams(words) if len(words) > 1 else [])
    scores |= {"character_count": len(text), "word_count": len(words)}
    scores |= _word_scores(text, words)
    lines = _LINE_ENDS.split(text) if skip_empty_lines else text.split("\n")
    scores |= _line_scores(text, lines, sum(map(len, words)))
    return {name: [(0, len(text), score)] for name, score in scores.items()}


def _word_scores(text: str, words: list[str]) -> dict[str, float]:
    counts, n = Counter(words), max(len(words), 1)
    symbols = 0
    if "#" in text or "\u2026" in text:
        symbols = sum(count for w, count in counts.items() if "#" in w or "\u2026" in w)
    with_letter = sum(count for word, count in counts.items() if _has_letter(word))
    return {
        "median_word_length": _median(list(map(len, words))),
        "symbol_to_word_ratio": symbols / n,
        "fraction_of_words_with_alpha_character": with_letter / n,
        "required_word_count": sum(counts[word] for word in STOP_WORDS),
    }


def _has_letter(word: str) -> bool:
    if word.isalpha():
        return True
    if word.isascii():
        return word.lower() != word.upper()
    return any(map(str.isalpha, word))


def _median(values: list[int]) -> float:
    values.sort()
    half = len(values) // 2
    if not values:
        return 0.0
    return float(values[half]) if len(values) % 2 else (values[half - 1] + values[half]) / 2


def _line_scores(text: str, lines: list[str], characters: int) -> dict[str, float]:
    bullets = text.count("\n*") + text.count("\n-") + text.startswith(("*", "-"))
    ellipses = text.count("\u2026\n") + text.endswith("\u2026")
    repeated = [(line, count) for line, count in Counter(lines).items() if count > 1]
    return {
        "fraction_of_lines_starting_with_bullet_point": bullets / len(lines),
        "fraction_of_lines_ending_with_ellipsis": ellipses / len(lines),
        "fraction_of_duplicate_lines": sum(count for _, count in repeated) / len(lines),
        "fraction_of_characters_in_duplicate_lines": sum(
            len(line) * count for line, count in repeated
        )
        / max(characters, 1),
    }


def _ngrams(words: list[str]) -> list[tuple[str, float]]:
    """Characters (without spaces) in the most common 2- to 4-gram, and in the 5- to 10-grams that
    are there twice or more, as shares: of all characters, and of those of all n-grams."""
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    word_N = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
    ends_N = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
    starts_N = np.concatenate([[0], ends_N[:-1]])
    characters = int(ends_N[-1])
    # Where an n-gram starts that is there more than once, and the n-gram's number.
    at, gram = np.arange(len(words)), word_N
    found: list[tuple[str, float]] = []
    for n in range(2, min(LONGEST, len(words)) + 1):
        fits = at + n <= len(words)
        at, gram = at[fits], gram[fits]
        at, gram, count = _repeated(at, gram * len(number) + word_N[at + n - 1])
        if n in MOST_COMMON:
            # The first of those that are the most common; the very first when none is repeated.
            first = int(at[np.argmax(count)]) if len(at) else 0
            most = int(count.max(initial=1))
            share = most * int(ends_N[first + n - 1] - starts_N[first]) / characters
            found.append((f"fraction_of_characters_in_most_common_{n}grams", share))
        else:
            total = int((ends_N[n - 1 :] - starts_N[: len(words) - n + 1]).sum())
            repeated = int((ends_N[at + n - 1] - starts_N[at]).sum())
            share = repeated / total
            found.append((f"fraction_of_characters_in_duplicate_{n}grams", share))
    return found


def _repeated(at: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions whose key is there more than once (in order), the keys as small numbers, and
    how often each is there."""
    _, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
    count_N = count[inverse]
    more = count_N > 1
    return at[more], inverse[more], count_N[more]
