"""Statistics of documents for people: tables for the terminal, and a page with plots."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from olmo_jax import pages
from olmo_jax.numerals import count_text, size_text, tick_text, ticks

_PLOTTED_SOURCES = 12
_PAGE_ROWS = 25
_TERMINAL_ROWS = 10
_COLUMNS = ("documents", "empty", "bytes", "characters", "words", "tokens", "paragraphs")
_NARROW = ("documents", "bytes", "words", "tokens")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 220, 48, 12, 10, 28


class Rows(NamedTuple):
    """A table; the columns after the first `texts` are numbers."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    texts: int = 1
    note: str = ""


class Bars(NamedTuple):
    """A histogram in the units of stat.html.j2's view box."""

    title: str
    note: str
    bars: list[tuple[float, float, float, float, str]]
    """Left, top, width, height, and what the pointer shows."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def terminal_tables(found: dict[str, Any]) -> Iterator[Table]:
    """What a terminal shows."""
    for table in _tables(found, _TERMINAL_ROWS, 60, _NARROW, count_text):
        shown = Table(box=SIMPLE_HEAD, title=table.title, title_justify="left", caption=table.note)
        shown.caption_justify = "left"
        for i, name in enumerate(table.head):
            shown.add_column(name, justify="left" if i < table.texts else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        yield shown


def page(found: dict[str, Any], title: str) -> str:
    """HTML."""
    everything = found["total"]["words_of_a_document"]
    lengths = [bars("Words of a document", everything)]
    if len(found["sources"]) > 1:
        lengths += [
            bars(f"Words of a document: {name}", row["words_of_a_document"])
            for name, row in list(found["sources"].items())[:_PLOTTED_SOURCES]
        ]
    scores = [bars(f"{name}: score", row["score"]) for name, row in found["attributes"].items()]
    return pages.render(
        Path(__file__).with_name("stat.html.j2"),
        title=title,
        tiles=list(_tiles(found)),
        tables=list(_tables(found, _PAGE_ROWS, 160, _COLUMNS)),
        lengths=[plot for plot in lengths if plot],
        scores=[plot for plot in scores if plot],
        box={"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _WIDTH - _RIGHT}
        | {"bottom": _HEIGHT - _BOTTOM},
    )


def bars(title: str, summary: dict[str, Any]) -> Bars | None:
    """A histogram from what Histogram.summary gave; None of one value. A logarithmic axis where
    the bins grow."""
    if not summary["count"] or summary["min"] == summary["max"]:
        return None
    edges, counts = summary["edges"], summary["counts"]
    is_log = len(edges) > 2 and edges[-1] - edges[-2] > 1.5 * (edges[1] - edges[0])

    def place(value: float) -> float:  # zero has a bin of its own below one
        return math.log10(max(value, 10**-0.25)) if is_log else value

    first, last = place(edges[0]), place(edges[-1])

    def x(value: float) -> float:
        return _LEFT + (place(value) - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    high = max(counts)
    scale = (_HEIGHT - _TOP - _BOTTOM) / high
    drawn = [
        (
            round(x(a), 1),
            round(_HEIGHT - _BOTTOM - n * scale, 1),
            round(max(x(b) - x(a) - 1, 0.5), 1),
            round(n * scale, 1),
            f"{_number(a)} to {_number(b)}: {n:,} ({n / summary['count']:.1%})",
        )
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
        if n
    ]
    if is_log:
        powers = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
        x_ticks = [(round(x(10**k), 1), tick_text(10.0**k)) for k in powers]
        x_ticks += [(round(x(edges[0]), 1), "0")] if edges[0] == 0 else []
    else:
        x_ticks = [(round(x(t), 1), tick_text(t)) for t in ticks(first, last, 5)]
    y_ticks = [
        (round(_HEIGHT - _BOTTOM - t * scale, 1), tick_text(t)) for t in ticks(0, high, 4) if t >= 1
    ]
    quantiles = summary["quantiles"]
    note = f"median {_number(quantiles['0.5'])}, 1 to 99 %: {_number(quantiles['0.01'])} to "
    return Bars(title, note + _number(quantiles["0.99"]), drawn, x_ticks, y_ticks)


def _tiles(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    total = found["total"]
    copies = found["duplicates"]
    yield "Documents", count_text(total["documents"]), f"{total['empty']:,} empty"
    yield "Text", size_text(total["bytes"]), f"{count_text(total['characters'])} characters"
    yield "Words", count_text(total["words"]), "with space around them"
    if "tokens" in total:
        ratio = total["bytes"] / max(total["tokens"], 1)
        yield "Tokens", count_text(total["tokens"]), f"{ratio:.2f} bytes a token"
    for kind in ("documents", "paragraphs"):
        row = copies[kind]
        n = row["different"] + row["repeats"]
        name = f"Repeated {kind}"
        yield name, f"{row['repeats'] / max(n, 1):.1%}", f"{row['repeats']:,} of {n:,}"


def _tables(
    found: dict[str, Any],
    n: int,
    letters: int,
    columns: Sequence[str],
    text: Callable[[float], str] = "{:,}".format,
) -> Iterator[Rows]:
    total = found["total"]
    counted = [name for name in columns if name in total]
    rows = [("all", total), *found["sources"].items()]
    yield Rows(
        "Sources",
        ("source", *counted, "median words", "mean"),
        [
            (name, *(text(row[what]) for what in counted), *_middle(row["words_of_a_document"]))
            for name, row in (rows if len(rows) > 2 else rows[1:])
        ],
    )
    yield Rows(
        "Duplicates",
        ("", "all", "different", "repeats", "share of repeats", "most copies of one"),
        [
            (
                kind,
                f"{row['different'] + row['repeats']:,}",
                f"{row['different']:,}",
                f"{row['repeats']:,}",
                f"{row['repeats'] / max(row['different'] + row['repeats'], 1):.2%}",
                f"{row['times'].get('max', 0):,.0f}",
            )
            for kind, row in found["duplicates"].items()
        ],
        note="Exact, by hashes of 64 bits; paragraphs are lines without the space around them.",
    )
    repeated = found["duplicates"].items()
    frequent = [(f"Most repeated {k}", k, r["most_repeated"]) for k, r in repeated]
    frequent = [("Domains", "domain", found["domains"]), *frequent]
    frequent += [(f"{k}-grams of words", "n-gram", row) for k, row in found["ngrams"].items()]
    for title, what, row in frequent:
        if row["items"]:
            yield _frequent(title, what, row, n, letters)
    if found["attributes"]:
        yield Rows(
            "Attributes",
            ("attribute", "documents with it", "spans", "mean score", "median", "min", "max"),
            [
                (
                    name,
                    f"{row['documents']:,}",
                    f"{row['score']['count']:,}",
                    *_scores(row["score"]),
                )
                for name, row in found["attributes"].items()
            ],
        )
    for tagger, labels in found["languages"].items():
        documents = sum(row[0] for row in labels.values())
        characters = sum(row[1] for row in labels.values())
        yield Rows(
            f"Likeliest label of {tagger}",
            ("label", "documents", "share", "share of characters"),
            [
                (label, f"{d:,}", f"{d / documents:.2%}", f"{c / max(characters, 1):.2%}")
                for label, (d, c) in sorted(labels.items(), key=lambda pair: -pair[1][0])[:n]
            ],
        )


def _frequent(title: str, what: str, row: dict[str, Any], n: int, letters: int) -> Rows:
    rows: list[tuple[str, ...]] = []
    for item in row["items"][:n]:
        low, high = item["count"], item["at_most"]
        count = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        rows.append((item["item"][:letters], count, f"{low / max(row['total'], 1):.3%}"))
    others = row["others_at_most"]
    note = (
        f"Of those that were not kept none is there more than {others:,} times." if others else ""
    )
    return Rows(title, (what, "count", "share of all"), rows, note=note)


def _middle(summary: dict[str, Any]) -> tuple[str, str]:
    if not summary["count"]:
        return "", ""
    return _number(summary["quantiles"]["0.5"]), _number(summary["mean"])


def _scores(summary: dict[str, Any]) -> tuple[str, ...]:
    if not summary["count"]:
        return ("",) * 4
    values = (summary["mean"], summary["quantiles"]["0.5"], summary["min"], summary["max"])
    return tuple(map(_number, values))


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
