"""A run that lives in a bucket, data, logs and checkpoints: killed, it resumes exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from olmo_jax.checkpoint import CheckpointReader, RunFolder
from olmo_jax.files import jsonl_lines
from tests.buckets import BUCKET, SERVERS, faulty, files, forget

ROOT = Path(__file__).parents[2]
GIN = """
Model.vocab_size = 64
Model.d_model = 32
Model.n_layers = 2
Model.n_heads = 2
Model.mlp_width = 32
Data.sequence_length = 16
Data.batch_size = 4
Data.eos_token_id = 0
Train.steps = 12
Checkpoint.every = 6
Checkpoint.ephemeral_every = 3
"""


@pytest.fixture(scope="module", params=["s3", "gs"])
def place(request, tmp_path_factory):
    """An address in a bucket with token files; this process and its children find the server
    through a proxy with these faults."""
    folder, protocol = tmp_path_factory.mktemp("bucket"), request.param
    (folder / "test.gin").write_text(GIN)
    tokens = np.random.default_rng(0).integers(1, 64, 40_000).astype(np.uint8)
    tokens[-1] = 1
    with SERVERS[protocol]() as variables, faulty(variables) as (led, faults):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in led.items():
                patch.setenv(name, value)
            patch.delenv("TENSORSTORE_GCS_HTTP_URL", raising=False)
            forget()
            url = f"{protocol}://{BUCKET}/place"
            files(protocol).pipe_file(f"{url}/tokens.npy", tokens.tobytes())
            yield folder, url, faults
        forget()


def start(place, run: str, processes: int, *bindings: str) -> subprocess.Popen:
    folder, url, _ = place
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    several = ["launch", "local", f"--processes={processes}", "--"] if processes > 1 else []
    command = [sys.executable, "-m", "olmo_jax.cli", *several]
    command += ["train", f"--gin_file={folder}/test.gin"]
    command += [f"--gin.Data.paths=('{url}/tokens.npy',)"]
    command += [f"--gin.Train.run_dir='{url}/{run}'", *(f"--gin.{b}" for b in bindings)]
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == status, errors
    return errors


def rows(url: str, name: str) -> list[dict]:
    return [json.loads(line) for line in jsonl_lines(RunFolder(url).path / name)]


def weights(url: str, step: int) -> dict[str, np.ndarray]:
    tensors = CheckpointReader(RunFolder(url).checkpoints).tensors(step)
    return {name: np.asarray(t.read().result()) for name, t in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_killed_run_resumes_exactly_in_spite_of_faults(place, n):
    """The processes of the one that is killed end with the one that started them."""
    _, url, faults = place
    faults.done = []
    whole, run = f"{url}/whole{n}", f"{url}/killed{n}"
    finish(start(place, f"whole{n}", n))
    killed = start(place, f"killed{n}", n)
    reader = CheckpointReader(RunFolder(run).checkpoints)
    deadline = time.monotonic() + 600
    while not reader.steps() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    finish(killed, -signal.SIGKILL)
    first = reader.steps()
    assert first and max(first) < 12, first
    faults.kinds, faults.every = ("500", "cut", "slow"), 5
    errors = finish(start(place, f"killed{n}", n))
    faults.kinds = ()
    assert f"resuming {run} from step" in errors
    assert {kind for kind, _, _ in faults.done} == {"500", "cut", "slow"}
    assert reader.steps() == [6, 9, 12]  # the newest ephemeral one too
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows(run, "metrics.jsonl")] == [
            row[name] for row in rows(whole, "metrics.jsonl")
        ]
    instances = rows(run, "instances.jsonl")
    assert instances == rows(whole, "instances.jsonl")
    assert [row["step"] for row in instances] == list(range(1, 13))
    a, b = weights(whole, 12), weights(run, 12)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
