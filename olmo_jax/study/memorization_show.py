"""A memorisation study for people: a table for the terminal, and a page with its passages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from tokenizers import Tokenizer

from olmo_jax import pages
from olmo_jax.report.plots import BOX, Curve, Plot, make_plot
from olmo_jax.study.memorization import Item

HEAD = ("", "sequences", "mean score", "95 % interval", "memorised", "share", "95 % interval")
MOST_PASSAGES, MOST_OTHERS = 100, 10


class Passage(NamedTuple):
    """A sequence as text."""

    about: str
    """Its score, how often and where it was read."""
    prompt: str
    continuation: str
    generated: str
    """Empty where it is the continuation."""


def rows(content: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Tables of texts with HEAD's columns."""

    def by_step(read: bool) -> list[list[str]]:
        of = [row for row in content["by step"] if row["read"] == read]
        return [_cells(f"steps {_span(row['steps'])}", row) for row in of]

    steps = content["steps"]
    read = f"read, of steps {steps}" if steps else f"read in {content['trained_steps']:,} steps"
    groups = [
        _cells(read, content["read"]),
        _cells("not read", content["not read"]),
    ]
    repeats = [_cells(_times(row["repeats"]), row) for row in content["by repeats"]]
    tables = {
        "All": groups,
        "By how often it was read": repeats,
        "By the step that reads it": by_step(True),
        "Not read yet, by the step that would": by_step(False),
    }
    return {name: cells for name, cells in tables.items() if cells}


def _times(ends: Sequence[int]) -> str:
    return {0: "never read", 1: "read once", 2: "read twice"}.get(
        ends[0], f"read {_span(ends)} times"
    )


def _span(ends: Sequence[int]) -> str:
    first, last = ends
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    if not row["sequences"]:
        return [name, "0", *[""] * 5]
    low, high = row["score_interval"]
    first, last = row["share_interval"]
    return [
        name,
        f"{row['sequences']:,}",
        f"{row['score']:.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{row['memorised']:,}",
        f"{row['share']:.2%}",
        f"{first:.2%} to {last:.2%}",
    ]


def table(content: dict[str, Any]) -> Table:
    """For the terminal: what was not read by step is the page's."""
    out = Table(box=SIMPLE_HEAD)
    for n, head in enumerate(HEAD):
        out.add_column(head, justify="right" if n else "left")
    for cells in list(rows(content).values())[:3]:
        for row in cells:
            out.add_row(*row)
        out.add_section()
    return out


def plots(content: dict[str, Any]) -> list[Plot]:
    """Mean score and share memorised, over the step that reads a sequence and over how often it was
    read."""
    drawn: list[Plot | None] = []
    read = [row for row in content["by step"] if row["read"]]
    unread = [row for row in content["by step"] if not row["read"]]
    repeats = content["by repeats"]
    names = [_span(row["repeats"]).replace(" to ", "-") for row in repeats]
    measures = (("score", "Mean score", "{:.3f}", 1), ("share", "Memorised, %", "{:.2f} %", 100))
    for key, title, form, scale in measures:
        curves = [
            _curve(name, colour, [sum(row["steps"]) / 2 for row in of], of, key, scale)
            for name, colour, of in (("read", "train", read), ("not read", "heldout", unread))
            if of
        ]
        levels = {}
        if not unread and content["not read"]["sequences"]:
            levels = {"held out": scale * content["not read"][key]}
        text = form.format
        drawn.append(make_plot(f"{title} by the step that reads it", curves, text, levels, True))
    for key, title, form, scale in measures:
        if len(repeats) > 1:
            curve = _curve("", "train", range(len(repeats)), repeats, key, scale)
            about = f"{title} by how often it was read"
            drawn.append(make_plot(about, [curve], form.format, None, True, names))
    return [plot for plot in drawn if plot]


def _curve(
    name: str, colour: str, at: Sequence[float], of: Sequence[dict], key: str, scale: int
) -> Curve:
    values = scale * np.array([row[key] for row in of], np.float64)
    interval = scale * np.array([row[f"{key}_interval"] for row in of], np.float64).T
    return Curve(name, colour, np.array(at, np.float64), values, dots=True, interval=interval)


def passages(items: Sequence[Item], tokenizer: Tokenizer | None) -> list[Passage]:
    """Each distinct sequence once, the highest score first, then what was read most often. Ids of
    tokens where there is no tokenizer."""
    distinct: dict[tuple[int, ...], Item] = {}
    for item in items:  # what was read first
        distinct.setdefault((*item.prompt, *item.continuation), item)
    best = sorted(distinct.values(), key=lambda item: (-item.score, -(item.repeats or 0), item.n))
    return [
        Passage(
            _about(item),
            _text(tokenizer, item.prompt),
            _text(tokenizer, item.continuation),
            "" if item.memorised else _text(tokenizer, item.generated),
        )
        for item in best
    ]


def _about(item: Item) -> str:
    where = "held-out text" if item.step is None else f"step {item.step:,}, row {item.row}"
    if item.group == "next":
        where = f"comes in {where}"
    times = [] if item.repeats is None else [_times((item.repeats, item.repeats))]
    return "; ".join([f"score {item.score:.3g}", *times, where, *(item.documents or ())])


def _text(tokenizer: Tokenizer | None, ids: Sequence[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def page(content: dict[str, Any], items: Sequence[Item], tokenizer: Tokenizer | None) -> str:
    """HTML of figures, plots, and the memorised passages, then the nearest others."""
    memorised = [item for item in items if item.memorised]
    others = [item for item in items if not item.memorised and item.score > 0]
    found = passages(memorised, tokenizer)
    return pages.render(
        Path(__file__).with_name("memorization.html.j2"),
        content=content,
        head=HEAD,
        tables=rows(content),
        plots=plots(content),
        box=BOX,
        memorised=found[:MOST_PASSAGES],
        more=max(0, len(found) - MOST_PASSAGES),
        others=passages(others, tokenizer)[:MOST_OTHERS],
    )
