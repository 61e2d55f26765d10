"""Real training in several processes on the loopback address, stopped, killed and begun again.

Losses of another number of processes agree to 1e-5 relative (float32, sums in another order);
those of a run that went on with the same number are the same to the last bit.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from olmo_jax.checkpoint import CheckpointReader
from olmo_jax.data.traced_run import TracedRun

ROOT = Path(__file__).parents[2]
GIN = """
Model.vocab_size = 64
Model.d_model = 16
Model.n_layers = 2
Model.n_heads = 2
Model.mlp_width = 32
Optimizer.kind = "skip_step_adamw"
Schedule.kind = "constant"
Data.sequence_length = 16
Data.batch_size = 8
Data.eos_token_id = 0
Train.steps = 1000000
Train.tensorboard = False
Checkpoint.every = 1000000
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tokens = np.random.default_rng(0).integers(0, 64, 40_000)
    tokens[::50] = 0
    tokens.astype(np.uint8).tofile(folder / "tokens.npy")
    (folder / "test.gin").write_text(GIN + f'Data.paths = ("{folder}/tokens.npy",)\n')
    return folder


def environment(place: Path) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }


def command(place: Path, run: str, *bindings: str) -> list[str]:
    gin = [f"--gin.{binding}" for binding in bindings]
    return ["train", f"--gin_file={place}/test.gin", f"--gin.Train.run_dir={place / run}", *gin]


def start(place: Path, arguments: list[str], code: str = "") -> subprocess.Popen:
    program = ["-c", code] if code else ["-m", "olmo_jax.cli"]
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(place: Path, n: int, run: str, *bindings: str) -> subprocess.Popen:
    local = ["launch", "local", f"--processes={n}", "--"]
    return start(place, [*local, *command(place, run, *bindings)])


class Processes:
    """n processes of a run, each started as on a host of its own."""

    def __init__(self, place: Path, n: int, run: str, *bindings: str, code: str = ""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.members = [
            start(
                place,
                [
                    *command(place, run, *bindings),
                    f"--coordinator=127.0.0.1:{port}",
                    f"--processes={n}",
                    f"--process_id={i}",
                ],
                code,
            )
            for i in range(n)
        ]

    def __getitem__(self, i: int) -> subprocess.Popen:
        return self.members[i]

    def finish(self, timeout: float = 600) -> tuple[list[int], list[str]]:
        """Statuses, and what each wrote to stderr."""
        deadline = time.monotonic() + timeout
        try:
            errors = [p.communicate(timeout=deadline - time.monotonic())[1] for p in self.members]
        finally:
            for process in self.members:
                process.kill()
        return [process.returncode for process in self.members], errors


def rows(run: Path, name: str = "metrics", heldout: bool = False) -> list[dict]:
    """The steps' rows, or the evaluations'."""
    file = run / f"{name}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in found if ("heldout/loss" in row) == heldout]


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def losses(run: Path) -> list[float]:
    assert [row["step"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))
    return [row["loss"] for row in rows(run)]


def instances(run: Path) -> list[tuple[int, list[int]]]:
    return [(row["step"], row["instance_ids"]) for row in rows(run, "instances")]


def assert_as_one_process(place: Path, run: str, *bindings: str) -> None:
    """The same instances and losses, step by step, as one process without a stop."""
    steps = len(rows(place / run))
    alone = start(place, command(place, f"{run}-alone", f"Train.stop_at={steps}", *bindings))
    _, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    assert instances(place / run) == instances(place / f"{run}-alone")
    # The first process's rows are what the whole batch has there.
    traced = TracedRun(place / run)
    assert all(traced.agrees(range(1, steps + 1)).values())
    np.testing.assert_allclose(losses(place / run), losses(place / f"{run}-alone"), rtol=1e-5)


def test_two_processes_stop_together_go_on_and_train_as_one(place):
    run = place / "two"
    # 1001 tokens are 63 rows, the last with one of its tokens: 8 batches, one of padding in part.
    np.fromfile(place / "tokens.npy", np.uint8)[-1001:].tofile(place / "heldout.npy")
    heldout = f'Train.heldout=("{place}/heldout.npy",)', "Train.heldout_every=3"
    process = launch(place, 2, "two", *heldout)
    wait_for(process, lambda: len(rows(run)) >= 4)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert errors.count("SIGTERM: saved step") == 1
    saved = len(rows(run))
    assert CheckpointReader(run / "checkpoints").steps() == [saved]
    process = launch(place, 2, "two", f"Train.stop_at={saved + 5}", *heldout)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert errors.count(f"resuming {run} from step {saved}") == 1
    assert len(rows(run)) == saved + 5
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert_as_one_process(place, "two", *heldout)
    found, alone = (rows(place / name, heldout=True) for name in ("two", "two-alone"))
    last = [saved + 5] if (saved + 5) % 3 else []
    steps = [*range(3, saved + 6, 3), *last]
    assert [row["step"] for row in found] == [row["step"] for row in alone] == steps
    np.testing.assert_allclose(
        [row["heldout/loss"] for row in found], [row["heldout/loss"] for row in alone], rtol=1e-5
    )


def test_an_error_in_one_process_ends_all_with_its_line(place):
    tokens = np.fromfile(place / "tokens.npy", np.uint8)
    # Where no file is looked at before it is read; in order, row 4 of the batch: the second's.
    tokens[16 * 260 : 16 * 261] = 99
    tokens.tofile(place / "bad.npy")
    bad = (f'Data.paths=("{place}/bad.npy",)', "Data.order=sequential")
    process = launch(place, 2, "bad", *bad)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2, errors
    assert "[1] error: " in errors and "token 99 at token offset 4160" in errors
    assert "error: process 1 (" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_four_processes_stopped_killed_and_fewer_train_as_one(place):
    run, often = place / "four", "Checkpoint.ephemeral_every=3"
    four = Processes(place, 4, "four", often)
    wait_for(four[0], lambda: len(rows(run)) >= 4)
    four[2].send_signal(signal.SIGTERM)
    statuses, errors = four.finish()
    assert statuses == [75] * 4, errors
    saved = len(rows(run))
    assert CheckpointReader(run / "checkpoints").latest() == saved
    assert "saved step" in errors[0] and not any("saved step" in text for text in errors[1:])

    four = Processes(place, 4, "four", often)
    wait_for(four[0], lambda: len(rows(run)) >= saved + 5)
    four[3].kill()
    began = time.monotonic()
    statuses, errors = four.finish()
    assert time.monotonic() - began < 60
    assert statuses == [76] * 3 + [-signal.SIGKILL], errors
    for text in errors[:3]:
        assert "error: process 3 (" in text and "no sign of life" in text

    stop = CheckpointReader(run / "checkpoints").latest() + 4
    # Over the tensor axis both of two processes read every row; else each its half.
    tensor = ("Mesh.fsdp=1", "Mesh.tensor=2")
    for n, stop_at, mesh in (
        (4, stop, ()),
        (2, stop + 4, tensor),
        (2, stop + 7, ()),
        (1, stop + 9, ()),
    ):
        process = launch(place, n, "four", f"Train.stop_at={stop_at}", *mesh)
        _, text = process.communicate(timeout=600)
        assert process.returncode == 0, text
        assert len(rows(run)) == stop_at

    whole = launch(place, 4, "whole", f"Train.stop_at={stop}")
    _, text = whole.communicate(timeout=600)
    assert whole.returncode == 0, text
    assert losses(place / "whole") == losses(run)[:stop]
    assert_as_one_process(place, "four")


@pytest.mark.slow
def test_when_the_first_process_is_killed_the_others_say_so(place):
    two = Processes(place, 2, "first", "Checkpoint.ephemeral_every=3")
    wait_for(two[0], lambda: len(rows(place / "first")) >= 5)
    two[0].kill()
    statuses, errors = two.finish(60)
    assert statuses == [-signal.SIGKILL, 76], errors
    assert errors[1].splitlines()[-1].startswith("error: process 0 (127.0.0.1), the coordinator")


JAX_FIRST = """
from olmo_jax.parallel import processes, watch
watch.DEAD_AFTER, processes._HEARTBEAT_TIMEOUT = 300.0, 40
from olmo_jax.cli import main
main()
"""


@pytest.mark.slow
def test_a_death_that_jax_notices_first_is_explained(place):
    """It aborts the processes in the thread by which they hear of one another."""
    three = Processes(place, 3, "noticed", "Mesh.data=3", "Data.batch_size=6", code=JAX_FIRST)
    wait_for(three[0], lambda: len(rows(place / "noticed")) >= 3)
    three[2].kill()
    statuses, errors = three.finish()
    assert statuses == [76, 76, -signal.SIGKILL], errors
    assert "error: no sign of life from process 2 (" in errors[0]
    assert "error: process 0 (127.0.0.1), the coordinator" in errors[1]


HANGS = """
import time
from olmo_jax.data.dataset import DataSet
from olmo_jax.parallel.processes import is_first
from olmo_jax.train.evaluate import HeldOut
batch, batches = DataSet.batch, HeldOut._batches

def stuck_in_a_read(self, step, rows=None):
    if step == 6 and 0 not in rows:
        time.sleep(1000)
    return batch(self, step, rows)

def stuck_in_an_evaluation(self):
    for k, piece in enumerate(batches(self)):
        if k == 3 and not is_first():
            time.sleep(1000)
        yield piece

{patch}
from olmo_jax.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "patch"),
    [
        ("stuck_in_a_read", "DataSet.batch = stuck_in_a_read"),
        ("stuck_in_an_evaluation", "HeldOut._batches = stuck_in_an_evaluation"),
    ],
)
def test_a_hang_ends_all_and_shows_where_each_was(place, where, patch):
    bindings = "Train.hang_minutes=1.0", "Data.workers=0", "Train.heldout_every=6"
    heldout = f'Train.heldout=("{place}/tokens.npy",)' if "evaluation" in where else ""
    bindings += (heldout,) if heldout else ()
    two = Processes(place, 2, where, *bindings, code=HANGS.replace("{patch}", patch))
    statuses, errors = two.finish()
    assert statuses == [76, 76], errors
    assert "no step for 1 minutes after step 6" in errors[0]
    first, second = errors[0].split("--- where process 1 was ---")
    assert "--- where process 0 was ---" in first and where not in first
    assert where in second
