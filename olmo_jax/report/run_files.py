"""Reads a run folder for the report: patient with files that are missing, empty or still written.

Not for resuming (checkpoint/ checks what it reads); imports no jax, so that a report of a run on a
pod is made on any laptop.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from olmo_jax.errors import UserError
from olmo_jax.files import jsonl_lines
from olmo_jax.storage import Entry, is_remote, listing


@dataclass(frozen=True)
class Checkpoint:
    step: int
    complete: bool
    permanent: bool
    bytes: int
    written: datetime
    parameters: int


@dataclass(frozen=True)
class Run:
    """Everything the page shows."""

    name: str
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    data: dict[str, Any]
    environment: dict[str, Any]
    config: dict[str, Any]
    config_gin: str
    checkpoints: list[Checkpoint]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values (float64) of the rows that have `name`; NaN where it is not finite."""
        rows = [row for row in self.rows if name in row]
        steps = np.array([number(row["step"]) for row in rows])
        values = np.array([number(row[name]) for row in rows])
        values[~np.isfinite(values)] = np.nan
        return steps, values

    def last(self, name: str) -> float:
        """The newest finite value of `name`, NaN without one."""
        values = self.series(name)[1]
        values = values[np.isfinite(values)]
        return float(values[-1]) if values.size else float("nan")


def number(value: Any) -> float:
    """A JSON number as a float; NaN for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else float("nan")


def read_run(run_dir: Path) -> Run:
    """Raises UserError when `run_dir` is missing or is no run folder."""
    if not run_dir.is_dir():
        raise UserError(f"there is no run folder {run_dir}; give the Train.run_dir of a run")
    if not any((run_dir / name).exists() for name in ("config.gin", "metrics.jsonl")):
        raise UserError(
            f"{run_dir} is not a run folder: it has neither metrics.jsonl nor config.gin; "
            "give the Train.run_dir of a run"
        )
    gin = run_dir / "config.gin"
    return Run(
        name=run_dir.name if is_remote(run_dir) else run_dir.resolve().name,
        rows=[row for row in _read_rows(run_dir / "metrics.jsonl") if _has_step(row)],
        samples=[row for row in _read_rows(run_dir / "samples.jsonl") if _has_step(row)],
        data=_read_json(run_dir / "data.json"),
        environment=_read_json(run_dir / "environment.json"),
        config=_read_json(run_dir / "config.json"),
        config_gin=gin.read_bytes().decode(errors="replace") if gin.exists() else "",
        checkpoints=_read_checkpoints(run_dir / "checkpoints"),
    )


def _has_step(row: dict[str, Any]) -> bool:
    return bool(np.isfinite(number(row.get("step"))))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file; a line that the run is still writing is passed over."""
    rows = []
    for line in jsonl_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_checkpoints(folder: Path) -> list[Checkpoint]:
    """The `step{N}` folders, rising; checkpoint/reader.py describes what is in them."""
    by_step: dict[int, dict[str, Entry]] = {}
    for name, entry in listing(folder).items():
        if match := re.fullmatch(r"step(\d+)/(.+)", name):
            by_step.setdefault(int(match[1]), {})[match[2]] = entry
    found = []
    for step, files in by_step.items():
        metadata = _read_json(folder / f"step{step}" / "metadata.json")
        found.append(
            Checkpoint(
                step=step,
                complete="manifest.json" in files,
                permanent=bool(metadata.get("permanent")),
                bytes=sum(entry.size for entry in files.values()),
                written=max(entry.written for entry in files.values()),
                parameters=_parameter_count(metadata),
            )
        )
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _parameter_count(metadata: dict[str, Any]) -> int:
    arrays = metadata.get("arrays")
    if not isinstance(arrays, dict):
        return 0
    shapes = [array["shape"] for name, array in arrays.items() if name.startswith("params/")]
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)
