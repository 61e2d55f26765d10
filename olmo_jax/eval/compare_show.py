"""Comparisons for people: tables for the terminal, and a page."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from olmo_jax import pages
from olmo_jax.eval.compare import Difference, Result
from olmo_jax.report.plots import BOX, Plot

HEAD = ("task", "metric", "items", "first", "this", "difference", "95 % interval", "")


def cells(row: Difference) -> tuple[str, ...]:
    """A row's texts."""
    difference, low, high = row.other - row.first, row.low, row.high
    verdict = {None: "no clear difference", True: "better", False: "worse"}[row.better]
    values = f"{row.first:.4f}", f"{row.other:.4f}", f"{difference:+.4f}"
    return (row.task, row.metric, f"{row.items:,}", *values, f"{low:+.4f} to {high:+.4f}", verdict)


def difference_table(name: str, rows: Sequence[Difference], first: str) -> Table:
    # Names are Texts: a str would be read as markup.
    title = Text(f"{name} against {first}", "table.title")
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for head in HEAD:
        table.add_column(head, justify="left" if head in ("task", "metric", "") else "right")
    for row in rows:
        table.add_row(*map(Text, cells(row)))
    return table


def steps_table(name: str, results: Sequence[Result]) -> Table:
    """A column for each of the first and last few steps."""
    shown = [*results[:2], *results[max(2, len(results) - 4) :]]
    title = Text(name, "table.title")
    table = Table("task", "metric", box=SIMPLE_HEAD, title=title, title_justify="left")
    for result in shown:
        table.add_column(f"step {result.step:,}", justify="right")
    for task, items in results[-1].tasks.items():
        values = [f"{r.tasks[task].value:.4f}" if task in r.tasks else "" for r in shown]
        table.add_row(Text(task), Text(items.metric), *values)
    return table


def page(
    title: str,
    first: str = "",
    compared: Sequence[tuple[str, Sequence[Difference]]] = (),
    plots: Sequence[Plot] = (),
) -> str:
    """HTML of differences to the first result, or of plots over the step."""
    return pages.render(
        Path(__file__).with_name("compare.html.j2"),
        title=title,
        first=first,
        head=HEAD,
        compared=[(name, [cells(row) for row in rows]) for name, rows in compared],
        plots=plots,
        box=BOX,
    )
