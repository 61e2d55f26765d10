"""Ten mistakes: each ends in one clear line, without a traceback, and loses nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GIN = """
Model.vocab_size = 64
Model.d_model = 16
Model.n_layers = 1
Model.n_heads = 2
Model.mlp_width = 32
Schedule.warmup = 1
Data.sequence_length = 16
Data.batch_size = 4
Train.steps = 4
Train.tensorboard = False
Checkpoint.every = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run, its gin file and its data."""
    folder = tmp_path_factory.mktemp("bad")
    tokens = np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint8)
    tokens.tofile(folder / "tokens.npy")
    (folder / "test.gin").write_text(GIN + f'Data.paths = ("{folder}/tokens.npy",)\n')
    (folder / "odd.npy").write_bytes(tokens.astype(np.uint16).tobytes()[:-1])
    tokens[1000] = 200
    tokens.tofile(folder / "high.npy")
    done = train(folder)
    assert done.returncode == 0, done.stderr
    return folder


def train(place: Path, *bindings: str, run: str = "run") -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "olmo_jax.cli", "train", f"--gin_file={place}/test.gin"]
    command += [f"--gin.Train.run_dir={place / run}", *(f"--gin.{b}" for b in bindings)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def assert_one_clear_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode not in (0, 75), done
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


MISTAKES = {
    "misspelt binding": (["Optimizer.lerning_rate=1"], ["lerning_rate", "learning_rate"]),
    "wrong type": (['Optimizer.learning_rate="high"'], ["Optimizer.learning_rate", "high"]),
    "changed configuration": (["Data.seed=9"], ["Data.seed = 9 (was 0)"]),
    "batch over the mesh": (["Mesh.data=3"], ["data=3", "devices"]),
    "micro-batch": (["Train.micro_batch_size=3"], ["micro_batch_size = 3", "4"]),
    "missing token file": (['Data.paths=("/missing.npy",)'], ["/missing.npy"]),
    "truncated token file": (
        ['Data.paths=("{place}/odd.npy",)', 'Data.dtype="uint16"'],
        ["odd.npy", "multiple of 2"],
    ),
    "token out of range": (['Data.paths=("{place}/high.npy",)'], ["high.npy", "1000", "200"]),
    "unknown tokenizer": (['Train.tokenizer="/no/tokenizer.json"'], ["/no/tokenizer.json"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_loses_nothing(place, mistake):
    bindings, words = MISTAKES[mistake]
    before = content(place / "run")
    assert_one_clear_line(train(place, *[b.format(place=place) for b in bindings]), *words)
    assert content(place / "run") == before


def test_a_read_only_run_folder(place, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a read-only file system needs root")
    try:
        assert_one_clear_line(train(place, f"Train.run_dir={tmp_path}/run"), str(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_named_and_the_run_goes_on_after_it(place, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        (tmp_path / "ballast").write_bytes(bytes(4_000_000))
        done = train(place, f"Train.run_dir={tmp_path}/run")
        assert_one_clear_line(done, "disk is full")
        (tmp_path / "ballast").unlink()
        done = train(place, f"Train.run_dir={tmp_path}/run")
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
