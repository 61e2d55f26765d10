"""An Inspection for people: a table for the terminal, and a page.

What was seen is inspection.py's.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from olmo_jax import pages
from olmo_jax.eval.inspection import Inspection

ROWS = 60  # tokens in the terminal's table; a page and a file have all
_DARK_FROM = 8.0  # nats: a loss from which a token's colour gets no deeper


class Token(NamedTuple):
    """A token as shown; a loss of None where nothing predicts it."""

    piece: str
    id: int
    loss: float | None
    chance: float
    """What the model gave it, 0 to 1."""
    shade: float
    """Of the deepest colour, 0 to 1."""
    alternatives: list[tuple[str, float]]
    """What was likeliest in its place, with probabilities."""


def tokens(found: Inspection) -> Iterator[Token]:
    """The text's tokens, each with what stood in its place."""
    chances_TK = np.exp(found.top_log_probs_TK)
    for t, (piece, i, loss) in enumerate(
        zip(found.pieces, found.ids_T.tolist(), found.losses_T.tolist(), strict=True)
    ):
        if t == 0:
            yield Token(piece, i, None, 0.0, 0.0, [])
            continue
        before = zip(found.top_ids_TK[t - 1].tolist(), chances_TK[t - 1].tolist(), strict=True)
        alternatives = [(found.top_pieces[j], p) for j, p in before]
        shade = min(loss / _DARK_FROM, 1.0)
        yield Token(piece, i, loss, math.exp(-loss), shade, alternatives)


def summary(found: Inspection) -> str:
    """One line: tokens, mean loss, perplexity."""
    n = len(found.ids_T)
    if n == 1:
        return "1 token, which nothing predicts"
    return (
        f"{n:,} tokens, mean loss {found.loss:.3f} nats, "
        f"perplexity {math.exp(min(found.loss, 700)):.2f}"
    )


def table(found: Inspection) -> Group:
    """The first tokens with their alternatives, and the layers' attention norms."""
    text = Table("token", "loss", "likeliest", box=SIMPLE_HEAD)
    for token in list(tokens(found))[:ROWS]:
        loss = "" if token.loss is None else f"{token.loss:.2f}"
        likeliest = " ".join(f"{piece!r} {p:.0%}" for piece, p in token.alternatives)
        text.add_row(Text(repr(token.piece)), loss, Text(likeliest))
    layers = Table("layer", "attention norm", "strongest head", box=SIMPLE_HEAD)
    for i, norms_H in enumerate(found.attention_norms_LHT.mean(axis=-1)):
        head = int(norms_H.argmax())
        layers.add_row(str(i), f"{norms_H.mean():.3f}", f"{head} ({norms_H[head]:.3f})")
    left = len(found.ids_T) - ROWS
    more = [Text(f"… and {left:,} more tokens: --out=x.html or x.npz has all")] if left > 0 else []
    return Group(Text(summary(found)), text, *more, layers)


def page(found: Inspection, model: str) -> str:
    """HTML: the text coloured by loss, its alternatives under the pointer; heads by what they
    write, mean over the tokens."""
    norms_LH = found.attention_norms_LHT.mean(axis=-1)
    highest = float(norms_LH.max()) or 1.0
    return pages.render(
        Path(__file__).with_name("inspection.html.j2"),
        model=model,
        summary=summary(found),
        tokens=list(tokens(found)),
        dark_from=_DARK_FROM,
        heads=[[(float(n), float(n) / highest) for n in norms_H] for norms_H in norms_LH],
    )
