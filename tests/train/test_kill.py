"""Real training processes, killed, stopped and damaged; each ends as the design says.

One uninterrupted run is the reference. Everything goes through the command line.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from olmo_jax.checkpoint import CheckpointReader

STEPS = 60
ROOT = Path(__file__).parents[2]
GIN = """
Model.vocab_size = 64
Model.d_model = 16
Model.n_layers = 2
Model.n_heads = 2
Model.mlp_width = 32
Optimizer.kind = "skip_step_adamw"
Schedule.kind = "cosine"
Schedule.warmup = 2
Data.sequence_length = 16
Data.batch_size = 4
Data.eos_token_id = 0
Train.steps = 60
Train.tensorboard = False
Checkpoint.every = 12
Checkpoint.ephemeral_every = 3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a gin file and token files, and a compilation cache that all runs share."""
    folder = tmp_path_factory.mktemp("kill")
    tokens = np.random.default_rng(0).integers(0, 64, 40_000)
    tokens[::50] = 0
    tokens.astype(np.uint8).tofile(folder / "tokens.npy")
    paths = f'Data.paths = ("{folder}/tokens.npy",)\n'
    (folder / "test.gin").write_text(GIN + paths)
    return folder


DIES_IN_RETENTION = """
import os, shutil, signal
remove = shutil.rmtree

def killed(path, *arguments, **options):
    if ".removed" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return remove(path, *arguments, **options)

shutil.rmtree = killed
from olmo_jax.cli import main
main()
"""


def start(place: Path, run: str, *bindings: str, code: str = "", devices: int = 1):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    program = ["-c", code] if code else ["-m", "olmo_jax.cli"]
    command = [sys.executable, *program, "train", f"--gin_file={place}/test.gin"]
    command += [f"--gin.Train.run_dir={place / run}", *(f"--gin.{b}" for b in bindings)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(place: Path, run: str, *bindings: str, status: int = 0, **options) -> str:
    """Runs to the end; returns what was written to stderr."""
    process = start(place, run, *bindings, **options)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return errors


def rows(run: Path, name: str) -> list[dict]:
    file = run / f"{name}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_until(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def kill(process: subprocess.Popen) -> None:
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 60
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    out = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(status.parent.name)
            out += [child, *children_of(child)]
    return out


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def arrays(run: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    reader = CheckpointReader(run / "checkpoints")
    return {
        f"{item}/{name}": np.asarray(tensor.read().result())
        for item in ("params", "train_state")
        for name, tensor in reader.tensors(step, item).items()
    }


def assert_ends_as(run: Path, reference: Path) -> None:
    """Bit-identical state, every step once in the logs, each with the reference's instances."""
    got, want = arrays(run), arrays(reference)
    assert set(got) == set(want)
    assert all(np.array_equal(got[name], want[name]) for name in want)
    for log in ("metrics", "instances"):
        assert [row["step"] for row in rows(run, log)] == list(range(1, STEPS + 1))
    assert rows(run, "instances") == rows(reference, "instances")
    losses = [row["loss"] for row in rows(run, "metrics")]
    assert losses == [row["loss"] for row in rows(reference, "metrics")]
    ids = [i for row in rows(run, "instances") for i in row["instance_ids"]]
    assert len(ids) == len(set(ids)) == 4 * STEPS


@pytest.fixture(scope="module")
def reference(place) -> Path:
    finish(place, "reference")
    return place / "reference"


def test_a_run_killed_five_times_ends_as_the_uninterrupted_one(place, reference):
    run = place / "killed"
    checkpoints = run / "checkpoints"
    moments = random.Random(1)
    workers = "Data.workers=1"

    def at_step(step):
        return lambda: len(rows(run, "metrics")) >= step

    def saving():
        return any(checkpoints.glob("step*.tmp"))

    first = moments.randint(1, 5)
    for moment, bindings in (
        (at_step(first), [workers]),
        (saving, []),
        (at_step(moments.randint(8, 11)), []),
        (None, []),
        (at_step(moments.randint(25, 40)), [workers]),
    ):
        if moment is None:
            finish(place, "killed", status=-signal.SIGKILL, code=DIES_IN_RETENTION)
            assert any(checkpoints.glob("*.removed.tmp"))
        else:
            process = start(place, "killed", *bindings)
            wait_until(process, moment)
            kill(process)
        assert CheckpointReader(checkpoints).latest() != STEPS
    finish(place, "killed", workers)
    assert_ends_as(run, reference)


def test_sigterm_saves_leaves_with_75_and_resumes(place, reference):
    process = start(place, "terminated")
    wait_until(process, lambda: len(rows(place / "terminated", "metrics")) >= 4)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert "leaving with status 75" in errors
    steps = CheckpointReader(place / "terminated" / "checkpoints").steps()
    assert steps[-1] == len(rows(place / "terminated", "metrics"))
    finish(place, "terminated")
    assert_ends_as(place / "terminated", reference)


def test_on_another_mesh_the_same_tokens_give_the_same_losses(place, reference):
    finish(place, "mesh", "Train.stop_at=13")
    mesh = ("Mesh.data=2", "Mesh.fsdp=2", "Mesh.tensor=2")
    finish(place, "mesh", *mesh, "Train.stop_at=33", devices=8)
    finish(place, "mesh", "Train.stop_at=36")
    run = place / "mesh"
    assert rows(run, "instances") == rows(reference, "instances")[:36]
    losses = [[row["loss"] for row in rows(folder, "metrics")] for folder in (run, reference)]
    np.testing.assert_allclose(losses[0], losses[1][:36], rtol=1e-5)


def test_a_half_written_newest_checkpoint_is_passed_over(place, reference):
    finish(place, "half", "Train.stop_at=13")
    (place / "half" / "checkpoints" / "step13" / "manifest.json").unlink()
    errors = finish(place, "half")
    assert "passed over" in errors and "taking step 12" in errors
    assert_ends_as(place / "half", reference)


def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(place, reference):
    run = place / "damaged"
    finish(place, "damaged", "Train.stop_at=13")
    files = [p for p in (run / "checkpoints" / "step13").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    before = rows(run, "metrics")
    errors = finish(place, "damaged", status=2)
    assert "is damaged" in errors and "take step 12" in errors
    assert rows(run, "metrics") == before
    (run / "checkpoints" / "step13").rename(run / "elsewhere")
    finish(place, "damaged")
    assert_ends_as(run, reference)


def test_changes_are_refused_and_a_fork_makes_them_possible(place, reference):
    finish(place, "old", "Train.stop_at=12")
    errors = finish(place, "old", "Optimizer.learning_rate=1e-3", "Data.seed=3", status=2)
    assert "Optimizer.learning_rate = 0.001 (was 0.0003)" in errors
    assert "Data.seed = 3 (was 0)" in errors
    fork = [sys.executable, "-m", "olmo_jax.cli", "fork", str(place / "old"), str(place / "new")]
    subprocess.run(fork, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    finish(place, "new", "Optimizer.learning_rate=1e-3")
    assert [row["step"] for row in rows(place / "new", "metrics")] == list(range(13, STEPS + 1))
    assert not np.array_equal(
        arrays(place / "new")["params/embed/weight"], arrays(reference)["params/embed/weight"]
    )


def test_changed_data_is_refused(place):
    other = place / "changing.npy"
    other.write_bytes((place / "tokens.npy").read_bytes())
    paths = f'Data.paths=("{other}",)'
    finish(place, "changed", "Train.stop_at=3", paths)
    content = bytearray(other.read_bytes())
    content[5] ^= 1
    other.write_bytes(content)
    errors = finish(place, "changed", paths, status=2)
    assert "the data is not that of the checkpoint" in errors


def test_a_loss_that_stays_not_finite_stops_after_the_last_good_state(place):
    bindings = ("Optimizer.learning_rate=1e30", "Optimizer.clip_norm=None", "Schedule.warmup=0")
    errors = finish(place, "diverged", *bindings, "Train.nonfinite_steps=3", status=2)
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "not finite in 3 steps in a row" in line and "olmo-jax data inspect" in line
    run = place / "diverged"
    [last] = CheckpointReader(run / "checkpoints").steps()[-1:]
    state = arrays(run, last)
    assert all(np.isfinite(a).all() for name, a in state.items() if name.startswith("params"))
    finite = [row["step"] for row in rows(run, "metrics") if row["loss"] is not None]
    assert last == finite[-1]


def test_a_stage_starts_from_the_one_before_and_a_soup_is_the_mean(place, reference):
    finish(place, "stage", f'Train.init_from=("{reference}",)', "Train.steps=2", "Data.seed=5")
    assert int(arrays(place / "stage", 2)["train_state/step"]) == 2
    assert int(arrays(place / "stage", 2)["train_state/opt_state/0/count"]) == STEPS + 2
    two = f'("{reference}", "{place / "stage"}")'
    finish(place, "soup", f"Train.init_from={two}", "Train.steps=0")
    mean = arrays(place / "soup", 0)["params/lm_head/weight"]
    parts = arrays(reference), arrays(place / "stage", 2)
    expected = sum(part["params/lm_head/weight"] for part in parts) / 2
    np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-8)
