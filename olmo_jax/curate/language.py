"""The language of documents and paragraphs, by CLD2, whose model comes inside its package; and
classifiers in fastText's format, which a person brings.

Names and values of the CLD2 taggers are Dolma's.
"""

import re
import unicodedata
from pathlib import Path

import pycld2

from olmo_jax.curate.documents import Attributes, Document, Span
from olmo_jax.curate.length import paragraphs
from olmo_jax.errors import UserError

_LABEL = "__label__"


def cld2_en_doc_v2(document: Document) -> Attributes:
    """`en` and `not_en`: how much of the document is English, 0 when CLD2 is not sure."""
    score, n = english(document.text), len(document.text)
    return {"en": [(0, n, score)], "not_en": [(0, n, 1.0 - score)]}


def cld2_en_paragraph_with_doc_score_v2(document: Document) -> Attributes:
    """`en` and `not_en` for each paragraph; `doc_en` is the mean over characters."""
    text, n = document.text, len(document.text)
    spans: list[Span] = [(s, e, english(text[s:e])) for s, e in paragraphs(text)]
    found: Attributes = {}
    if spans:
        found = {"en": spans, "not_en": [(s, e, 1.0 - score) for s, e, score in spans]}
    score = sum((e - s) * score for s, e, score in spans) / n if n else 0.0
    return found | {"doc_en": [(0, n, score)], "doc_not_en": [(0, n, 1 - score if n else 0.0)]}


def english(text: str) -> float:
    """CLD2's share of English in a text."""
    try:
        reliable, _, languages = pycld2.detect(text)
    except pycld2.error:  # it refuses control characters
        clean = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs"))
        try:
            reliable, _, languages = pycld2.detect(clean)
        except pycld2.error:
            return 0.0
    share = next((percent for name, _, percent, _ in languages if name == "ENGLISH"), 0)
    return share / 100.0 if reliable else 0.0


class FastText:
    """`fasttext:MODEL.bin`: the score of each label, for the text in one line. Raises UserError for
    a file that is no model."""

    def __init__(self, path: str | None):
        import fasttext

        if not path or not Path(path).is_file():
            raise UserError(f"fasttext: {path}: no such model; give fasttext:MODEL.bin")
        try:
            self._model = fasttext.load_model(path)
        except (ValueError, RuntimeError) as e:
            raise UserError(f"{path}: is no fastText model: {e}") from None

    def __call__(self, document: Document) -> Attributes:
        labels, scores = self._model.predict(" ".join(document.text.split()), k=-1)
        n = len(document.text)
        names = [re.sub(r"\W", "_", label.removeprefix(_LABEL)) for label in labels]
        return {
            name: [(0, n, min(float(score), 1.0))]
            for name, score in zip(names, scores, strict=True)
        }
