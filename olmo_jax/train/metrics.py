"""Writes what a run measured: metrics.jsonl, instances.jsonl and samples.jsonl, TensorBoard, W&B.

Not for reading them back (report/ does) and not for the terminal (progress.py does).
"""

import importlib
import json
import math
import os
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from olmo_jax import storage
from olmo_jax.errors import UserError
from olmo_jax.files import replacing, write_bytes
from olmo_jax.train.parts import PartsLog
from olmo_jax.train.tensorboard import EventFile


class JsonlLog:
    """A file of one JSON object per line, each with its "step"; it survives SIGKILL and resumes.

    A row goes to the operating system in one unbuffered write, so a killed process loses none;
    `flush` makes the rows written so far survive a power failure too. Opening the file with
    `resume_step` = s cuts off the rows after step s, and a half-written last line, by writing a new
    file and renaming it over the old one: a kill at any moment leaves either of the two. With
    s = 0 nothing was restored, and the file starts empty.

    A run folder in a bucket cannot be appended to; there it is `parts.PartsLog`.
    """

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_after(resume_step)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; give a run folder that can be written to"
            ) from error
        self._size = path.stat().st_size

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends `row` (JSON types; "step" among its keys). Raises UserError on a full disk."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):  # a disk that fills up takes part of a line, then fails
                self._file.write(line[written:])
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._size)
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room, then start the same "
                "command again to resume from the newest checkpoint"
            ) from error
        self._size += len(line)

    def flush(self) -> None:
        """Returns when all rows so far are on the disk (fsync)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.flush()
            self._file.close()

    def _cut_after(self, resume_step: int) -> None:
        with replacing(self.path) as new:
            if resume_step > 0 and self.path.exists():
                with open(self.path, "rb") as old:
                    for number, line in enumerate(old, 1):
                        step = _step_of(line)
                        if step is None and line.endswith(b"\n"):
                            warnings.warn(
                                f"{self.path}: line {number} is damaged and left out", stacklevel=2
                            )
                        elif step is not None and step <= resume_step:
                            new.write(line)


def _step_of(line: bytes) -> int | None:
    """The step of a complete line, None for a damaged or half-written one."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class MetricsWriter:
    """All of a run's logs. Use it from one process only (the one with process index 0).

    `resume_step` is the step of the restored checkpoint, 0 when the run starts from nothing: what
    was logged after it is cut off, so that the logs have neither gap nor repeat, provided the loop
    calls `flush` before it saves a checkpoint, and writes a step's evaluation before that too.

    Nothing here waits for a disk or a network except `flush` and `close`: rows go to the page
    cache, W&B has a process of its own.
    """

    def __init__(self, run_dir: Path | str, tensorboard: bool, wandb: bool, resume_step: int):
        run_dir = storage.location(run_dir)
        Log = PartsLog if storage.is_remote(run_dir) else JsonlLog
        wandb_module = _import_wandb() if wandb else None
        self._metrics = Log(run_dir / "metrics.jsonl", resume_step)
        self._instances = Log(run_dir / "instances.jsonl", resume_step)
        self._samples = Log(run_dir / "samples.jsonl", resume_step)
        self._tensorboard = EventFile(run_dir / "tensorboard", resume_step) if tensorboard else None
        self._wandb = _open_wandb(wandb_module, run_dir, resume_step) if wandb_module else None

    def write(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl: "step" (steps finished) and numbers by name.

        NumPy and JAX scalars are taken; a number that is not finite is written as null, because
        JSON has no NaN.
        """
        numbers = {name: _number(value) for name, value in row.items()}
        self._metrics.write(numbers)
        step = int(row["step"])
        scalars = {k: v for k, v in numbers.items() if v is not None and k != "step"}
        now = scalars.pop("time", time.time())
        if self._tensorboard is not None:
            self._tensorboard.write(scalars, step, now)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def write_instances(
        self, step: int, instance_ids: Iterable[int], tokens: str = "", rows: Iterable[int] = ()
    ) -> None:
        """Which instances the batch of `step` (1-based, as in metrics.jsonl) was made of, and the
        digest of its tokens (`data.trace.digest`); of these rows where they are not all."""
        row: dict[str, Any] = {"step": step, "instance_ids": [int(n) for n in instance_ids]}
        row |= {"tokens_xxh3": tokens} if tokens else {}
        row |= {"rows": some} if (some := [int(r) for r in rows]) else {}
        self._instances.write(row)

    def write_sample(self, step: int, prompt: str, text: str) -> None:
        """A text that the model of `step` wrote after `prompt`."""
        self._samples.write({"step": step, "prompt": prompt, "text": text})

    def flush(self) -> None:
        """Returns when all rows so far are on the disk; call it before saving a checkpoint."""
        for log in (self._metrics, self._instances, self._samples):
            log.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        for log in (self._metrics, self._instances, self._samples):
            log.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetrics(MetricsWriter):
    """In the place of a MetricsWriter in every process but the first: writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, row: Mapping[str, Any]) -> None:
        pass

    def write_instances(self, *_: Any) -> None:
        pass

    def write_sample(self, step: int, prompt: str, text: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _number(value: Any) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return int(value) if isinstance(value, bool) else value


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            "logging to W&B was asked for and wandb is not installed; "
            "run `pip install 'olmo-jax[wandb]'` or leave it off"
        ) from error


def _open_wandb(wandb_module: Any, run_dir: Path, resume_step: int) -> Any:
    """A resumed run goes on under its own id; W&B passes over the steps that it already has."""
    id_file = run_dir / "wandb" / "run_id.txt"
    in_bucket = storage.is_remote(run_dir)
    if not in_bucket:
        id_file.parent.mkdir(parents=True, exist_ok=True)
    if resume_step == 0 or not id_file.exists():
        write_bytes(id_file, uuid.uuid4().hex[:12].encode())
    return wandb_module.init(
        project=os.environ.get("WANDB_PROJECT", "olmo_jax"),
        name=run_dir.name if in_bucket else run_dir.resolve().name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=tempfile.mkdtemp(prefix="olmo_jax_wandb_") if in_bucket else str(run_dir),
    )
