"""Results as a table in the terminal and as a page that asks the network for nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_jax import pages

if TYPE_CHECKING:
    from rich.table import Table

    from olmo_jax.eval.run import Results

ALSO = ("acc", "len_norm", "bpb")  # columns beside the task's own metric


def terminal_table(results: "Results") -> "Table":
    """A row for each task, and for each suite its mean."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    head, rows = cells(results)
    for name in head:
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # a str would be read as markup
    return table


def cells(results: "Results") -> tuple[list[str], list[list[str]]]:
    """Column heads, and each row's texts."""
    tasks: dict[str, Any] = results.content["tasks"]
    also = [m for m in ALSO if any(m in task["metrics"] for task in tasks.values())]
    out = []
    for row in results.rows():
        metrics = tasks[row["task"]]["metrics"] if row["task"] in tasks else {}
        error = "" if row["stderr"] is None else f"± {row['stderr']:.4f}"
        count = "" if row["questions"] is None else f"{row['questions']:,}"
        values = [f"{metrics[m]:.4f}" if m in metrics else "" for m in also]
        out.append([row["task"], row["metric"], f"{row['value']:.4f}", error, *values, count])
    return ["task", "metric", "value", "", *also, "questions"], out


def render(results: Sequence["Results"]) -> str:
    """The page as HTML, a table for each model."""
    return pages.render(
        Path(__file__).with_name("page.html.j2"),
        results=[(r.content, *cells(r)) for r in results],
    )
