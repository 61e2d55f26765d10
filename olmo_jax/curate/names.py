"""Which attributes there can be, so that a misspelt one in a filter is refused and not just absent.

A name that taggers or a de-duplication give may be in no document; any other is a mistake.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from olmo_jax import storage
from olmo_jax.curate.documents import attributes_path
from olmo_jax.curate.taggers import variable_name
from olmo_jax.errors import UserError

_C4 = (
    *("has_curly_brace", "has_javascript", "has_lorem_ipsum", "has_naughty_word", "line_count"),
    *("lines_with_no_ending_punctuation", "lines_with_too_few_words"),
)
_GOPHER = (
    *("character_count", "word_count", "median_word_length", "symbol_to_word_ratio"),
    *("fraction_of_words_with_alpha_character", "required_word_count"),
    *("fraction_of_lines_starting_with_bullet_point", "fraction_of_lines_ending_with_ellipsis"),
    *("fraction_of_duplicate_lines", "fraction_of_characters_in_duplicate_lines"),
    *(f"fraction_of_characters_in_most_common_{n}grams" for n in range(2, 5)),
    *(f"fraction_of_characters_in_duplicate_{n}grams" for n in range(5, 11)),
)
_PII = ("EMAIL_ADDRESS", "PHONE_NUMBER", "IP_ADDRESS")
_REPETITIONS = tuple(f"doc_{what}_repetition" for what in ("frac", "max_length", "max_score"))
_UNISEG = ("paragraph", "negative_paragraph")
TYPES: dict[str, tuple[str, ...]] = {
    "gopher_v1": _GOPHER,
    "gopher_v2": _GOPHER,
    "c4_v1": _C4,
    "c4_v2": _C4,
    "pii_regex_v1": (*_PII, "doc"),
    "pii_regex_v2": (*_PII, "doc"),
    "pii_regex_with_counts_v2": (*_PII, "doc", "doc_count"),
    "pii_regex_with_counts_fast_v2": (*_PII, "doc_count", "doc_frac"),
    "bytes_length_v1": ("bytes",),
    "doc_count_v1": ("docs",),
    "char_length_v1": ("length",),
    "char_length_strip_ws_v1": ("length_no_ws",),
    "char_length_with_paragraphs_v1": ("paragraph", "document"),
    "whitespace_tokenizer_v1": ("length",),
    "whitespace_tokenizer_with_paragraphs_v1": ("paragraph", "document"),
    "uniseg_length_v1": ("length",),
    "uniseg_length_paragraphs_v1": _UNISEG,
    "uniseg_length_paragraphs_with_empty_v1": _UNISEG,
    "uniseg_length_paragraphs_with_doc_length_v1": (*_UNISEG, "document", "negative_document"),
    "repetitions_v1": ("repetition", *_REPETITIONS),
    "paragraph_repetitions_v1": ("repetition", *_REPETITIONS),
    "cld2_en_doc_v2": ("en", "not_en"),
    "cld2_en_paragraph_with_doc_score_v2": ("en", "not_en", "doc_en", "doc_not_en"),
    "random_number_v1": ("random",),
    "url_blocklist": ("url",),
    "domain_blocklist": ("url",),
    "word_blocklist": ("word", "doc_frac"),
    "ngram_overlap": ("contaminated", "doc_frac"),
}
"""What taggers give. Those that are not here (a classifier's labels, packages') may give any."""


class Known(NamedTuple):
    """What attributes there can be."""

    names: frozenset[str] = frozenset()
    beginnings: tuple[str, ...] = ()
    """With anything after them."""
    is_all: bool = True
    """Whether there can be no others."""

    def __add__(self, other: "Known") -> "Known":  # type: ignore[override]
        beginnings = self.beginnings + other.beginnings
        return Known(self.names | other.names, beginnings, self.is_all and other.is_all)

    def has(self, name: str) -> bool:
        return name in self.names or name.startswith(self.beginnings)

    def check(self, wanted: Iterable[str], where: str) -> None:
        """Raises UserError for a name that there cannot be, with the nearest that there can."""
        for name in sorted(wanted):
            if not self.has(name):
                [near] = difflib.get_close_matches(name, self.names, 1, 0.6) or [""]
                hint = f"did you mean {near}?" if near else "there are"
                few = "" if near else f" {', '.join([*sorted(self.names), *self.beginnings][:20])}"
                raise UserError(f"{where} has an attribute {name}; {hint}{few}")


def of_taggers(experiment: str, taggers: Sequence[str]) -> Known:
    """Those of taggers as `data tag` is given them."""
    names: list[str] = []
    beginnings: list[str] = []
    for spec in taggers:
        tagger = spec.partition(":")[0]
        start = f"{experiment}__{variable_name(tagger)}__"
        if tagger in TYPES:
            names += [start + kind for kind in TYPES[tagger]]
        else:
            beginnings.append(start)
    return Known(frozenset(names), tuple(beginnings))


def of_experiments(paths: Sequence[str], experiments: Sequence[str]) -> Known:
    """Those of attributes files of documents, by the settings that were left beside them; not all
    where another program has written some."""
    known = Known()
    for experiment in experiments:
        folders = {attributes_path(path, experiment).rpartition("/")[0]: None for path in paths}
        places = (storage.location(f) / f".{experiment}.settings.json" for f in folders)
        found = next((place for place in places if storage.exists(place)), None)
        settings = {} if found is None else json.loads(storage.read(found))
        dedupe = settings.get("dedupe", {})
        part = dedupe.get("documents") or dedupe.get("paragraphs")
        if "taggers" in settings:
            known += of_taggers(experiment, settings["taggers"])
        elif part:
            known += Known(frozenset([part["attribute_name"]]))
        else:
            known = known._replace(is_all=False)
    return known
