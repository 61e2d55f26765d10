"""batches.html: some steps of a run as they were read, row by row, with their documents.

What the steps read is data/trace.py's business.
"""

from pathlib import Path
from typing import Any

from olmo_jax import pages
from olmo_jax.data.trace import Row
from olmo_jax.data.trace_show import Stretch, stretches
from olmo_jax.data.traced_run import TracedRun
from olmo_jax.files import write_file
from olmo_jax.storage import location

NAME = "batches.html"
STEPS, ROWS = 16, 8  # the page of a run with 4096 tokens a row stays below 3 MB

Step = tuple[int, bool | None, list[Row], list[list[Stretch]]]
"""A step, whether it is as the run recorded it, some of its rows, and their parts."""


def write_batches(run_dir: Path | str) -> Path:
    """Writes RUN/batches.html and returns its path: the first step, the last, and steps between.

    Raises UserError where the token files are not there, or not what they were.
    """
    folder = location(run_dir)
    run = TracedRun(folder)
    tokenizer, trace = run.tokenizer(), run.trace
    n = trace.last - trace.first
    count = min(STEPS, n)
    chosen = [trace.first + 1 + (n - 1) * k // max(1, count - 1) for k in range(count)]
    agrees = run.agrees(chosen)
    steps: list[Step] = []
    for step in chosen:
        size = trace.dataset.batch_size(trace.batch_step(step))
        rows = trace.rows(step, list(range(min(size, ROWS))))
        tokens_BT = trace.batch(step, [row.row for row in rows]).tokens_BT
        parts = [list(stretches(row, t, tokenizer)) for row, t in zip(rows, tokens_BT, strict=True)]
        steps.append((step, agrees[step], rows, parts))
    path = folder / NAME
    write_file(path, page(folder.name, steps))
    return path


def page(title: str, steps: list[Step]) -> str:
    """The page as HTML."""
    shown: list[dict[str, Any]] = [
        {"step": step, "agrees": agrees, "rows": list(zip(rows, parts, strict=True))}
        for step, agrees, rows, parts in steps
    ]
    template = Path(__file__).with_name("batches.html.j2")
    return pages.render(template, script_file="batches.js", title=title, steps=shown)
