"""Runs of the real command line on a tiny model, for the tests that kill, stop and misuse them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from olmo_jax.checkpoint import CheckpointReader

STEPS, EVERY, BATCH, LENGTH, VOCAB = 60, 7, 4, 16, 64

GIN = f"""
Model.vocab_size = {VOCAB}
Model.d_model = 16
Model.n_layers = 1
Model.n_heads = 2
Model.mlp_width = 32
Model.context_length = {LENGTH}
Optimizer.learning_rate = 0.01
Schedule.warmup_steps = 3
Data.paths = ("{{folder}}/tokens/*.npy",)
Data.sequence_length = {LENGTH}
Data.batch_size = {BATCH}
Train.steps = {STEPS}
Train.run_dir = "{{folder}}/run"
Train.heldout = ("{{folder}}/heldout.npy",)
Train.heldout_every = 20
Train.tensorboard = False
Checkpoint.ephemeral_every = {EVERY}
"""


def write_tokens(path: Path, count: int, seed: int) -> None:
    """Tokens that follow a pattern with noise, so that the loss of a tiny model falls."""
    rng = np.random.default_rng(seed)
    tokens = (np.arange(count) * 3 + rng.integers(0, 4, count)) % (VOCAB - 1) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens.astype(np.uint8).tofile(path)


class Workplace:
    """A folder with token files, a gin file and run folders, and the command line over them."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache
        self.run = folder / "run"
        instances = STEPS * BATCH * 5 // 4  # less than one epoch: no instance is to come twice
        write_tokens(folder / "tokens" / "a.npy", instances * LENGTH // 2, seed=1)
        write_tokens(folder / "tokens" / "b.npy", instances * LENGTH // 2, seed=2)
        write_tokens(folder / "heldout.npy", 20 * LENGTH, seed=3)
        self.gin = folder / "tiny.gin"
        self.gin.write_text(GIN.format(folder=folder))

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """`olmo-jax ARGUMENTS` as a process of its own."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "COLUMNS": "400",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "olmo_jax.cli", *map(str, arguments)],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_training(self, run: Path | None = None, **bindings: object) -> subprocess.Popen[str]:
        """Trains in `run`; bindings as Train__steps=3."""
        bindings = {"Train__run_dir": str(run or self.run)} | bindings
        flags = [f"--gin.{k.replace('__', '.')}={v!r}" for k, v in bindings.items()]
        return self.start("train", f"--gin_file={self.gin}", *flags)

    def train(self, run: Path | None = None, status: int = 0, **bindings: object) -> str:
        """Trains to the process's end and gives its standard error."""
        return finish(self.start_training(run, **bindings), status)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Waits for a process; its standard error."""
    try:
        _, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == status, errors
    return errors


def error_line(errors: str) -> str:
    """The one line that a refused command says; nothing else may stand on standard error."""
    [line] = [line for line in errors.splitlines() if line.strip()]
    assert line.startswith("error: "), errors
    return line


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, weights and the rest of the state, by name."""
    reader = CheckpointReader(run / "checkpoints")
    items = (reader.tensors(step, item) for item in ("params", "train_state"))
    return {name: tensor.read().result() for item in items for name, tensor in item.items()}


def assert_same_state(run: Path, other: Path, step: int = STEPS) -> None:
    """Parameters and optimizer state are bit for bit the same."""
    here, there = arrays(run, step), arrays(other, step)
    assert here.keys() == there.keys() and any("mu" in name for name in here)
    for name, array in here.items():
        assert array.dtype == there[name].dtype and array.shape == there[name].shape, name
        assert array.tobytes() == there[name].tobytes(), name


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_whole_history(run: Path, steps: int = STEPS) -> None:
    """No gap and no repeat in the logs, and no instance was seen twice."""
    metrics = rows(run / "metrics.jsonl")
    train = [row["step"] for row in metrics if "loss" in row]
    assert train == list(range(1, steps + 1))
    evaluated = [row["step"] for row in metrics if "heldout/loss" in row]
    assert evaluated == [step for step in range(1, steps + 1) if step % 20 == 0 or step == steps]
    instances = rows(run / "instances.jsonl")
    assert [row["step"] for row in instances] == list(range(1, steps + 1))
    ids = [i for row in instances for i in row["instance_ids"]]
    assert len(ids) == len(set(ids)) == steps * BATCH


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def wait_until(
    process: subprocess.Popen[str], seen: Callable[[], bool], seconds: float = 120
) -> bool:
    """Polls without a pause, to catch what lasts milliseconds; False when the process ends first.

    The process's end is asked for last, so what it left behind is still seen.
    """
    end = time.monotonic() + seconds
    while not seen():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "what the test waits for never came"
    return True


def kill(process: subprocess.Popen[str]) -> list[int]:
    """SIGKILL; returns the children (Grain's workers, and what else it had started)."""
    children = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return children


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def are_gone(pids: Sequence[int], seconds: float = 10) -> bool:
    """Whether the processes end; one that waits for its parent to ask (Z) has ended."""

    def runs(pid: int) -> bool:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"

    end = time.monotonic() + seconds
    while any(map(runs, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own; skips the test where mounting is not permitted."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
