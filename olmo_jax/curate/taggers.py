"""The taggers by name, and running them over a file of documents.

A tagger takes a Document and gives {type: [(start, end, score), …]}; the attribute is then
`<experiment>__<tagger>__<type>`, its scores rounded to five places.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

from olmo_jax.curate import blocklists, c4, decontaminate, gopher, length, pii, repetition
from olmo_jax.curate.documents import (
    Attributed,
    Attributes,
    Document,
    encode,
    read_documents,
    writing,
)
from olmo_jax.curate.executor import Advance
from olmo_jax.errors import UserError

Tagger = Callable[[Document], Attributes]
ENTRY_POINTS = "olmo_jax.taggers"
_PLACES = 5

# By name; those that take something after a colon are made of it.
_TAGGERS: dict[str, Tagger] = {
    "gopher_v1": gopher.gopher_v1,
    "gopher_v2": gopher.gopher_v2,
    "c4_v1": c4.c4_v1,
    "c4_v2": c4.c4_v2,
    "pii_regex_v1": pii.pii_regex_v1,
    "pii_regex_v2": pii.pii_regex_v2,
    "pii_regex_with_counts_v2": pii.pii_regex_with_counts_v2,
    "pii_regex_with_counts_fast_v2": pii.pii_regex_with_counts_fast_v2,
    "bytes_length_v1": length.measure("bytes", length.byte_length),
    "doc_count_v1": length.measure("docs", lambda _: 1),
    "char_length_v1": length.measure("length", len),
    "char_length_strip_ws_v1": length.measure("length_no_ws", length.stripped_length),
    "char_length_with_paragraphs_v1": length.with_paragraphs(len, total=False),
    "whitespace_tokenizer_v1": length.measure("length", length.words_and_signs),
    "whitespace_tokenizer_with_paragraphs_v1": length.with_paragraphs(
        length.words_and_signs, total=True
    ),
    "uniseg_length_v1": length.measure("length", length.segments),
    "uniseg_length_paragraphs_v1": length.uniseg_paragraphs(False, False),
    "uniseg_length_paragraphs_with_empty_v1": length.uniseg_paragraphs(True, False),
    "uniseg_length_paragraphs_with_doc_length_v1": length.uniseg_paragraphs(False, True),
    "repetitions_v1": repetition.repetitions_v1,
    "paragraph_repetitions_v1": repetition.paragraph_repetitions_v1,
}
_MADE: dict[str, Callable[[str | None], Tagger]] = {
    "random_number_v1": blocklists.RandomNumber,
    "url_blocklist": blocklists.UrlBlocklist,
    "domain_blocklist": blocklists.DomainBlocklist,
    "word_blocklist": blocklists.WordBlocklist,
    "ngram_overlap": decontaminate.NgramOverlap,
}
_LANGUAGE = ("cld2_en_doc_v2", "cld2_en_paragraph_with_doc_score_v2", "fasttext")


def tagger_names() -> list[str]:
    """All taggers there are, those of entry points included."""
    added = (entry.name for entry in entry_points(group=ENTRY_POINTS))
    return sorted({*_TAGGERS, *_MADE, *_LANGUAGE, *added})


def load_tagger(spec: str) -> Tagger:
    """The tagger of a name, or of `name:option`. An entry point in the group `olmo_jax.taggers` is
    called with the option (or None) and gives the tagger. Raises UserError."""
    name, _, option = spec.partition(":")
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        return entry.load()(option or None)
    if name in _MADE:
        return _MADE[name](option or None)
    if option and name in tagger_names() and name != "fasttext":
        raise UserError(f"{spec}: {name} takes nothing after a colon")
    if name in _LANGUAGE:
        try:
            from olmo_jax.curate import language
        except ImportError:
            raise UserError(f"{name}: install olmo-jax[curate]") from None
        if name == "fasttext":
            return language.FastText(option or None)
        return getattr(language, name)
    if name not in _TAGGERS:
        near = difflib.get_close_matches(name, tagger_names(), 1)
        raise UserError(
            f"{name}: no such tagger{f', did you mean {near[0]}?' if near else ''}; there are "
            f"{', '.join(tagger_names())}"
        )
    return _TAGGERS[name]


def tag_file(path: str, out: str, taggers: Sequence[str], experiment: str, advance: Advance) -> int:
    """Writes the attributes file `out` of a documents file; returns its documents. Raises
    UserError."""
    loaded = [(variable_name(spec.partition(":")[0]), load_tagger(spec)) for spec in taggers]
    n = done = 0
    with writing(out) as file:
        for n, (document, line) in enumerate(read_documents(path), 1):
            attributes: Attributes = {}
            for name, tagger in loaded:
                try:
                    found = tagger(document)
                except Exception as e:
                    raise UserError(
                        f"{path}: line {line.number}: tagger {name} failed: {type(e).__name__}: {e}"
                    ) from e
                for kind, spans in found.items():
                    rounded = [(s, e, round(float(score), _PLACES)) for s, e, score in spans]
                    attributes[f"{experiment}__{name}__{variable_name(kind)}"] = rounded
            row = Attributed(document.id or "", attributes, document.source or "")
            file.write(encode(row) + b"\n")
            if n % 100 == 0:
                advance(100, line.bytes_read - done)
                done = line.bytes_read
        if n:
            advance(n % 100, line.bytes_read - done)
    return n


def variable_name(name: str) -> str:
    """A name with underscores for all else than letters, digits and underscores."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)
