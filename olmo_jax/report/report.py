"""Makes report.html from a run folder: one file that asks the network for nothing.

What is on the page and in which words; run_files.py reads, plots.py draws, the template lays out.
"""

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olmo_jax import pages, storage
from olmo_jax.errors import UserError
from olmo_jax.files import write_bytes
from olmo_jax.numerals import count_text, size_text
from olmo_jax.report.batches import NAME as BATCHES
from olmo_jax.report.plots import BOX, Curve, Plot, make_plot
from olmo_jax.report.run_files import Run, number, read_run
from olmo_jax.storage import location

SAMPLE_STEPS = 12  # the newest ones; with them the page stays well below a megabyte
SAMPLE_LETTERS = 4000
EVALUATIONS = 6  # newest steps in the table of tasks
BITS, HELDOUT_LOSS = "heldout/bits_per_byte", "heldout/loss"


class Tile(NamedTuple):
    label: str
    value: str
    note: str = ""


class Bar(NamedTuple):
    label: str
    value: float
    percent: float
    ours: bool


class Table(NamedTuple):
    """A caption, the column heads, and rows of (text, whether it is a number)."""

    caption: str
    head: list[str]
    rows: list[list[tuple[str, bool]]]


def write_report(run_dir: Path | str) -> Path:
    """Writes RUN/report.html and returns its path.

    Needs nothing but the folder; whatever is missing in it is missing on the page. Raises UserError
    when `run_dir` is no run folder or cannot be written to.
    """
    run_dir = location(run_dir)
    batches = BATCHES if storage.exists(run_dir / BATCHES) else ""
    page = render(read_run(run_dir), batches)
    path = run_dir / "report.html"
    try:
        write_bytes(path, page.encode())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room, or copy the run folder "
            "elsewhere"
        ) from error
    return path


def render(run: Run, batches: str = "") -> str:
    """The page as HTML; `batches` is the name of the page of batches beside it, if there is one."""
    return pages.render(
        Path(__file__).with_name("template.html.j2"),
        run=run,
        status=_status(run),
        written=datetime.now(UTC),
        bits=_finite(run.last(BITS)),
        bars=list(_bars(run)),
        tiles=list(_tiles(run)),
        plots=[plot for plot in _plots(run) if plot is not None],
        box=BOX,
        evaluation=_evaluation(run),
        samples=_samples(run),
        data_tables=[
            table
            for table in (
                _table("Training text", run.data.get("sources")),
                _table("Held-out text", run.data.get("heldout")),
            )
            if table.rows
        ],
        environment=[
            (name.removesuffix("_bytes").replace("_", " "), _cell(name, fact)[0])
            for name, fact in run.environment.items()
        ],
        size_text=size_text,
        batches=batches,
    )


def _status(run: Run) -> str:
    done = run.rows[-1]["step"] if run.rows else 0
    train = run.config.get("Train")
    planned = number(train.get("steps")) if isinstance(train, dict) else math.nan
    if not run.rows:
        return "No step is finished yet"
    if done < planned:
        return f"Step {done:,} of {planned:,.0f}"
    return f"{done:,} steps" + (", finished" if done == planned else "")


def _baselines(run: Run) -> dict[str, float]:
    baselines = run.data.get("baselines")
    if not isinstance(baselines, dict):
        return {}
    return {
        str(name): number(value)
        for name, value in baselines.items()
        if math.isfinite(number(value))
    }


def _bars(run: Run) -> Iterator[Bar]:
    """Ours and the baselines in bits per byte, the best first."""
    ours = run.last(BITS)
    if not math.isfinite(ours):
        return
    entries = [(run.name, ours, True), *((n, v, False) for n, v in _baselines(run).items())]
    longest = max(value for _, value, _ in entries)
    for name, value, is_ours in sorted(entries, key=lambda entry: entry[1]):
        yield Bar("this model" if is_ours else name, value, 100 * value / longest, is_ours)


def _tiles(run: Run) -> Iterator[Tile]:
    if math.isfinite(run.last("heldout/perplexity")):
        loss = run.last(HELDOUT_LOSS)
        note = f"loss {loss:.3f} a token" if math.isfinite(loss) else ""
        yield Tile("Held-out perplexity", f"{run.last('heldout/perplexity'):,.2f}", note)
    if math.isfinite(run.last("loss")):
        recent = run.series("loss")[1][-20:]
        mean = float(np.nanmean(recent)) if np.isfinite(recent).any() else math.nan
        note = f"{mean:.3f} over the last {len(recent)} steps" if len(recent) > 1 else ""
        yield Tile("Training loss", f"{run.last('loss'):.3f}", note if math.isfinite(mean) else "")
    if math.isfinite(run.last("tokens")):
        yield Tile("Tokens seen", count_text(run.last("tokens")), f"{run.last('tokens'):,.0f}")
    parameters = run.checkpoints[-1].parameters if run.checkpoints else 0
    if parameters:
        yield Tile("Parameters", count_text(parameters), f"{parameters:,}")
    steps, seconds = run.series("step_seconds")
    if seconds.size and np.isfinite(seconds).any():
        # A row may stand for the steps since the one before.
        spans = np.maximum(np.diff(steps, prepend=steps[0] - 1), 0)
        in_steps = float(np.nansum(spans * seconds))
        times = run.series("time")[1]
        wall = max(in_steps, float(np.nanmax(times) - np.nanmin(times)) if times.size else 0.0)
        yield Tile("Wall time", time_text(wall), f"{time_text(in_steps)} of it in training steps")
    speed = run.series("tokens_per_second")[1]
    if np.isfinite(speed).any():
        mfu = run.last("mfu")
        note = f"MFU {mfu:.1%}" if math.isfinite(mfu) else "median of all steps"
        yield Tile("Tokens a second", count_text(float(np.nanmedian(speed))), note)
    skipped = float(np.nansum(run.series("skipped")[1]))
    if skipped:
        yield Tile("Skipped steps", f"{skipped:,.0f}", "their update was not applied")


def _plots(run: Run) -> Iterator[Plot | None]:
    def curve(name: str, label: str, colour: str = "train", smoothed=False, dots=False):
        return Curve(label, colour, *run.series(name), smoothed=smoothed, dots=dots)

    def decimals(value: float) -> str:
        return f"{value:.3f}"

    yield make_plot(
        "Loss",
        [
            curve("loss", "training", smoothed=True),
            curve(HELDOUT_LOSS, "held-out", "heldout", dots=True),
        ],
        decimals,
    )
    yield make_plot(
        "Held-out bits per byte",
        [curve(BITS, "held-out", "heldout", dots=True)],
        decimals,
        levels=_baselines(run),
    )
    yield make_plot(
        "Learning rate",
        [curve("learning_rate", "learning rate")],
        lambda rate: f"{rate:.3g}",
        from_zero=True,
    )
    yield make_plot(
        "Gradient norm", [curve("grad_norm", "norm", smoothed=True)], decimals, from_zero=True
    )
    yield make_plot(
        "Experts' load, as a multiple of the mean",
        [
            curve("expert_load_max", "fullest", smoothed=True),
            curve("expert_load_min", "emptiest", "heldout", smoothed=True),
        ],
        decimals,
        from_zero=True,
    )
    yield make_plot(
        "Load-balancing loss (1 is balance)",
        [curve("load_balancing_loss", "training", smoothed=True)],
        decimals,
    )
    yield make_plot(
        "Throughput, tokens a second",
        [curve("tokens_per_second", "tokens/s", "speed", smoothed=True)],
        count_text,
        from_zero=True,
    )
    yield make_plot(
        "Step time, seconds",
        [curve("step_seconds", "seconds", "speed", smoothed=True)],
        lambda seconds: f"{seconds:.3g} s",
        from_zero=True,
    )


def _evaluation(run: Run) -> Table:
    """The tasks' numbers at the newest steps: a row for the metric that each reports first, and one
    for its bits per byte."""
    rows = [row for row in run.rows if any(name.startswith("eval/") for name in row)]
    columns: dict[int, dict[str, Any]] = {int(row["step"]): row for row in rows}
    steps = sorted(columns)[-EVALUATIONS:]
    shown: dict[tuple[str, str], None] = {}
    for name in (name for row in rows for name in row if name.startswith("eval/")):
        task, _, metric = name.removeprefix("eval/").rpartition("/")
        if metric == "bpb" or all(task != other for other, _ in shown):
            shown[task, metric] = None

    def cell(step: int, task: str, metric: str) -> tuple[str, bool]:
        value = number(columns[step].get(f"eval/{task}/{metric}"))
        return (f"{value:.4f}" if math.isfinite(value) else "", True)

    return Table(
        "acc, len_norm: share answered right; bpb: bits a byte of the right answer, less is better",
        ["Task", "Metric", *(f"Step {step:,}" for step in steps)],
        [
            [(task, False), (metric, False), *(cell(step, task, metric) for step in steps)]
            for task, metric in shown
        ],
    )


def _samples(run: Run) -> list[tuple[int, list[dict[str, str]]]]:
    """The newest steps with samples, the newest first."""
    by_step: dict[int, list[dict[str, str]]] = {}
    for row in run.samples:
        texts = {key: str(row.get(key, ""))[:SAMPLE_LETTERS] for key in ("prompt", "text")}
        # Some writers give the prompt again at the head of the text.
        texts["text"] = texts["text"].removeprefix(texts["prompt"])
        by_step.setdefault(int(row["step"]), []).append(texts)
    return sorted(by_step.items(), reverse=True)[:SAMPLE_STEPS]


def _table(caption: str, rows: Any) -> Table:
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(
        caption,
        [name.replace("_", " ").capitalize() for name in names],
        [[_cell(name, row.get(name)) for name in names] for row in rows],
    )


def _cell(name: str, value: Any) -> tuple[str, bool]:
    """A fact of a JSON file in words, and whether it is a number."""
    if value is None:
        return "not known", False
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return (value if isinstance(value, str) else json.dumps(value)), False
    if "bytes" in name and isinstance(value, int):
        return size_text(value), True
    if name == "share":
        return f"{value:.1%}", True
    return (f"{value:,}" if isinstance(value, int) else f"{value:.4g}"), True


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def time_text(seconds: float) -> str:
    """8.3s, 4m 31s, 2h 05m, 3d 4h: two units are what a person reads."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}h {minute:02}m" if hours else f"{minute}m {second:02}s"
