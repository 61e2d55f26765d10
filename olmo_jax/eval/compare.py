"""Results side by side: paired differences of two or more, and curves over training steps.

Reads what `olmo-jax eval --out` writes: tasks, domains, or lm-eval's tasks.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olmo_jax.errors import UserError
from olmo_jax.eval.domains import resampled_sums
from olmo_jax.report.plots import Curve, Plot, make_plot

COLOURS = ("train", "heldout", "speed")
_ROLLING = ("bits_per_byte", "byte_perplexity", "word_perplexity")
_LOWER = ("bpb", "bits_per_byte", "brier_score", "ter")


class Items(NamedTuple):
    """A task's questions, or a domain's documents: its value is one sum over another."""

    metric: str
    names: list[str]
    """What each is called: two results pair when these are equal."""
    values_N2: np.ndarray
    """Numerator and denominator of each."""

    @property
    def value(self) -> float:
        numerator, denominator = self.values_N2.sum(axis=0)
        return float(numerator / denominator)


class Result(NamedTuple):
    """One file of results."""

    model: str
    step: int | None
    tasks: dict[str, Items]


class Difference(NamedTuple):
    """A task of one result against the same of the first."""

    task: str
    metric: str
    items: int
    first: float
    other: float
    low: float
    high: float
    """The 95 % interval of other - first."""

    @property
    def better(self) -> bool | None:
        """Whether the other is better; None where the interval has zero in it."""
        if self.low <= 0 <= self.high:
            return None
        lower = self.metric in _LOWER or self.metric.startswith("log2 ")
        return (self.other > self.first) != lower


def read_result(path: Path) -> Result:
    """Raises UserError for a file that holds no results."""
    try:
        content = json.loads(path.read_bytes())
        model = str(content["model"])
        if "documents" in content:
            tasks = _domains(content)
        else:
            tasks = {name: _task(task) for name, task in content["tasks"].items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: is not a result of `olmo-jax eval --out`: {type(error).__name__} {error}"
        ) from None
    name, step = _step(model)
    if step is None:
        step = _step(path.stem)[1]
    return Result(name, step, tasks)


def differences(first: Result, other: Result, seed: int = 0) -> list[Difference]:
    """Of each task that both have, by a bootstrap that draws the same questions for both.

    Raises UserError when they have none in common, or a task's questions are not the same.
    """
    rng, rows = np.random.default_rng(seed), []
    for task, a in first.tasks.items():
        if (b := other.tasks.get(task)) is None:
            continue
        if (a.metric, a.names) != (b.metric, b.names):
            raise UserError(
                f"{task}: {first.model} has {len(a.names):,} items of {a.metric} and {other.model} "
                f"{len(b.names):,} of {b.metric}, which are not the same: evaluate both with the "
                "same --limit and metric"
            )
        values_N4 = np.concatenate([a.values_N2, b.values_N2], axis=1)
        drawn = resampled_sums(values_N4, rng)
        ratios = drawn[:, 2] / drawn[:, 3] - drawn[:, 0] / drawn[:, 1]
        low, high = np.percentile(ratios, [2.5, 97.5])
        counts = len(a.names), a.value, b.value
        rows.append(Difference(task, a.metric, *counts, float(low), float(high)))
    if not rows:
        raise UserError(
            f"{first.model} and {other.model} have no task in common: {', '.join(first.tasks)}; "
            f"{', '.join(other.tasks)}"
        )
    return rows


def read_folder(folder: Path) -> list[Result]:
    """The results of a training's checkpoints, by step. Raises UserError for one without a step."""
    results = [read_result(path) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise UserError(f"{folder}: has no results (*.json)")
    for result in results:
        if result.step is None:
            raise UserError(
                f"{folder}: the result of {result.model} has no step: evaluate with --step=N, or "
                "name the file step500.json"
            )
    return sorted(results, key=lambda result: result.step or 0)


def plots(folders: Mapping[str, Sequence[Result]]) -> list[Plot]:
    """A plot for each task: its value over the step, a curve for each folder."""
    metrics = {
        task: items.metric
        for results in folders.values()
        for result in results
        for task, items in result.tasks.items()
    }
    drawn = []
    for task, metric in metrics.items():
        curves = []
        for n, (name, results) in enumerate(folders.items()):
            points = [(r.step, r.tasks[task].value) for r in results if task in r.tasks]
            if points:
                steps, values = (np.array(a, np.float64) for a in zip(*points, strict=True))
                colour = COLOURS[n % len(COLOURS)]
                curves.append(Curve(name, colour, steps, values, dots=True))
        plot = make_plot(f"{task}: {metric}", curves, "{:.4f}".format)
        drawn += [plot] if plot else []
    return drawn


def _task(task: dict[str, Any]) -> Items:
    """Items of `run.evaluate`, or of lm-eval's tasks, which give each metric's value."""
    metric, items = task["metric"], task["items"]
    if items and "values" in items[0]:
        names = [str(item["doc"]) for item in items]
        found = [item["values"][metric] for item in items]
        if metric in _ROLLING:  # (log-likelihood, of how many bytes or words)
            found = [(-nats / math.log(2), size) for nats, size in found]
            metric = metric if metric == "bits_per_byte" else f"log2 {metric}"
        elif metric == "perplexity":  # log-likelihoods
            found, metric = [(-nats / math.log(2), 1.0) for nats in found], "log2 perplexity"
        elif isinstance(found[0], list):
            raise UserError(f"{metric} is no mean over items, which alone can be paired")
        else:
            found = [(float(value), 1.0) for value in found]
        return Items(metric, names, np.array(found, np.float64))
    names = [f"{n}: {item['label']} of {item['bytes']}" for n, item in enumerate(items)]
    values = [(_value(metric, item), 1.0) for item in items]
    # F1 is no mean over questions; a loss a character is not among what the file keeps.
    shown = {"f1": "acc", "ce_loss": "bpb"}.get(metric, metric)
    return Items(shown, names, np.array(values, np.float64).reshape(-1, 2))


def _value(metric: str, item: dict[str, Any]) -> float:
    """Of one question: the right answer's bits a byte, or whether the right one was chosen."""
    right = item["label"]
    if metric in ("bpb", "ce_loss"):
        return -item["logprobs"][right] / math.log(2) / item["bytes"][right]
    return float(item["choice"] == right)


def _domains(content: dict[str, Any]) -> dict[str, Items]:
    """Each domain's bits per byte, and all documents' together."""
    found: dict[str, tuple[list[str], list[tuple[float, float]]]] = {}
    for domain, where, nats, _, size in content["documents"]:
        for name in (domain, "all documents"):
            names, values = found.setdefault(name, ([], []))
            names.append(f"{domain} {where}")
            values.append((nats / math.log(2), size))
    return {n: Items("bits_per_byte", names, np.array(v)) for n, (names, v) in found.items()}


def _step(name: str) -> tuple[str, int | None]:
    """`runs/demo at step 500` as ("runs/demo", 500); step500, step-500, step_500 are read, too."""
    found = re.search(r" at step (\d+)$", name)
    for last in re.finditer(r"(?<![A-Za-z])step[ _-]?(\d+)", name) if found is None else ():
        found = last
    if found is None:
        return name, None
    return name[: found.start()].rstrip("/-_ ") or name, int(found[1])
