"""What a `Trace` finds, for people in a terminal and as JSON for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from olmo_jax.data.token_files import Document, TokenFile
from olmo_jax.data.trace import Found, Row

_CONTEXT = 24  # tokens on either side of what was found
_STEPS = 20


class Stretch(NamedTuple):
    """A part of a row that is of one document, or of none that is known."""

    document: Document | None
    path: str
    start: int
    end: int
    at: int
    """Where in the row it begins, in tokens."""
    text: str | None

    @property
    def source(self) -> str:
        """Which document, and which of its tokens."""
        d = self.document
        if d is None:
            return f"{self.path} tokens {self.start:,} to {self.end:,}"
        whole = self.start == d.start and self.end == d.end
        part = f"{self.start - d.start:,} to {self.end - d.start:,} of {d.end - d.start:,}"
        return f"{d.id} · {'all' if whole else 'tokens ' + part} · {d.src}:{d.loc}"


def stretches(row: Row, tokens_T: np.ndarray, tokenizer: Tokenizer | None) -> Iterator[Stretch]:
    """A row cut at its documents' borders, `tokens_T` as text where there is a tokenizer."""
    at = 0
    for place in row.places:
        documents = iter(place.documents)
        document = next(documents, None)
        start = place.start
        while start < place.end:
            while document is not None and document.end <= start:
                document = next(documents, None)
            end = place.end
            inside = document is not None and document.start <= start
            if document is not None:
                end = min(end, document.end if inside else document.start)
            ids = tokens_T[at : at + end - start].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else None
            yield Stretch(document if inside else None, place.path, start, end, at, text)
            at, start = at + end - start, end


def show_rows(rows: Sequence[Row], parts: Sequence[list[Stretch]]) -> Iterator[RenderableType]:
    """The rows of a step as text, under their documents."""
    for row, stretches_ in zip(rows, parts, strict=True):
        yield Text(
            f"row {row.row} · instance {row.instance_id:,}, n {row.n:,}, epoch {row.epoch}",
            "bold",
        )
        for s in stretches_:
            yield Text(f"from token {s.at}: {s.source}", "cyan")
            if s.text is not None:
                yield Text(s.text)
        yield ""


def show_document(found: Found, most: int) -> Iterator[RenderableType]:
    """A document, and a line for each time that some of it was read."""
    yield from _place(found)
    if found.sightings:
        table = Table(box=SIMPLE_HEAD)
        for name in ("step", "row", "epoch", "instance", "its tokens", "from the row's token"):
            table.add_column(name, justify="right")
        for s in found.sightings[:most]:
            tokens = f"{s.start - found.start:,} to {s.end - found.start:,}"
            cells = (f"{c:,}" for c in (s.step, s.row, s.epoch, s.instance_id))
            table.add_row(*cells, tokens, f"{s.at:,}")
        yield f"read {times(len(found.sightings))}, {in_steps([found])}"
        yield table
    yield from _left(found, most)


def show_place(found: Found, text: str, most: int) -> Iterator[RenderableType]:
    """A place where a text is, and when it was read."""
    yield Text(f"… {text} …", "bold")
    yield from _place(found)
    length = found.end - found.start
    for s in found.sightings[:most]:
        cut = f", {s.end - s.start} of its {length} tokens" * (s.end - s.start < length)
        yield f"read in step {s.step:,}, row {s.row}, from its token {s.at} (epoch {s.epoch}{cut})"
    yield from _left(found, most)


def _place(found: Found) -> Iterator[RenderableType]:
    for d in found.documents:
        inside = (
            f"tokens {found.start - d.start:,} to {found.end - d.start:,} of {d.end - d.start:,}"
        )
        if (found.start, found.end) == (d.start, d.end):
            inside = f"{d.end - d.start:,} tokens"
        yield Text(f"{d.id} · {inside} · {d.src}:{d.loc}", "cyan")
    yield f"{found.path} tokens {found.start:,} to {found.end:,}"


def _left(found: Found, most: int) -> Iterator[RenderableType]:
    if not found.sightings:
        yield "not read in these steps"
    if (left := len(found.sightings) - most) > 0:
        yield f"… and {left:,} more times (--limit)"
    yield ""


def show_seen(seen: list[dict[str, Any]]) -> RenderableType:
    """The counts of each source."""
    table = Table(box=SIMPLE_HEAD)
    names = [name.replace("_", " ") for name in seen[0]]
    for name in names:
        table.add_column(name, justify="left" if name == "source" else "right")
    for row in seen:
        table.add_row(
            *["?" if c is None else c if isinstance(c, str) else f"{c:,}" for c in row.values()]
        )
    return table


def in_steps(found: Sequence[Found]) -> str:
    """The steps that read any of them, in a line."""
    steps = sorted({step for one in found for step in one.steps})
    if not steps:
        return "in no step"
    shown = ", ".join(f"{step:,}" for step in steps[:_STEPS])
    more = f" … {steps[-1]:,} ({len(steps):,} in all)" if len(steps) > _STEPS else ""
    return f"in step{'s' if len(steps) > 1 else ''} {shown}{more}"


def times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n:,} times")


def snippet(file: TokenFile, start: int, end: int, tokenizer: Tokenizer) -> str:
    """The text of tokens [start, end) with a little of what is around it, on one line."""
    ids = file.tokens[max(0, start - _CONTEXT) : end + _CONTEXT].tolist()
    return tokenizer.decode(ids, skip_special_tokens=False).replace("\n", " ⏎ ")


def found_json(found: Found) -> dict[str, Any]:
    """A Found as JSON: {path, start, end, documents, sightings, steps}."""
    return {
        **asdict(found),
        "documents": [d._asdict() for d in found.documents],
        "steps": found.steps,
    }


def row_json(row: Row, parts: list[Stretch]) -> dict[str, Any]:
    """A Row as JSON: its numbers, and its parts with document and text."""
    numbers = {k: v for k, v in vars(row).items() if k != "places"}
    cut = [
        part._asdict() | {"document": part.document and part.document._asdict()} for part in parts
    ]
    return numbers | {"parts": cut}
