"""launch/slurm.sh on a real SLURM of two tasks: trains across them, stops, and starts by itself."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import cluster, missing, output

ROOT = Path(__file__).parents[2]
GIN = """
Model.vocab_size = 64
Model.d_model = 16
Model.n_layers = 2
Model.n_heads = 2
Model.mlp_width = 32
Optimizer.learning_rate = 0.01
Data.sequence_length = 16
Data.batch_size = 4
Data.eos_token_id = 0
Data.paths = ("tokens.npy",)
Train.run_dir = "run"
Train.steps = 2
Train.tensorboard = False
"""
SECONDS = 120


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_two_tasks_train_and_a_stopped_job_goes_on_by_itself(tmp_path):
    np.random.default_rng(0).integers(1, 64, 40_000).astype(np.uint8).tofile(
        tmp_path / "tokens.npy"
    )
    (tmp_path / "test.gin").write_text(GIN)
    (tmp_path / "slurm").mkdir()
    with cluster(tmp_path / "slurm") as environment:
        job = Job(tmp_path, environment)
        job.submit("two", "--gin.Train.run_dir=two")
        job.wait("COMPLETED")
        losses = {row["step"]: row["loss"] for row in job.metrics("two")}
        assert list(losses) == [1, 2] and losses[2] < losses[1]
        assert job.facts("two")["processes"] == job.facts("two")["devices"] == 2

        # Stopped by a signal, as before the time limit: saved, queued again, trained to the end.
        job.submit("on", "--gin.Train.run_dir=on", "--gin.Train.steps=300")
        job.until(lambda: job.metrics("on"))
        output(environment, "scancel", "--signal=TERM", job.id)
        job.wait("PENDING")
        assert "status 75" in job.log("on")
        saved = len(job.metrics("on"))
        assert 0 < saved < 300
        # SLURM itself lets two minutes pass before it starts a job that was queued again. With none
        # at all its node would take the new start for the old one (seen; its clock has seconds).
        time.sleep(3)
        output(environment, "scontrol", "update", f"JobId={job.id}", "StartTime=now")
        job.wait("COMPLETED")
        assert [row["step"] for row in job.metrics("on")] == list(range(1, 301))

        # A mistake isn't tried again.
        job.submit("wrong", "--gin.Train.stepz=2")
        job.wait("FAILED")
        assert "Train.stepz" in job.log("wrong")


class Job:
    """The job submitted last."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = environment | {
            "PATH": path,
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
            "JAX_PLATFORMS": "cpu",
        }

    def submit(self, name: str, *arguments: str) -> None:
        sbatch = ["sbatch", "--parsable", f"--chdir={self.folder}", "--ntasks=2"]
        sbatch += [f"--output={name}.out", str(ROOT / "launch" / "slurm.sh")]
        said = output(self.environment, *sbatch, "--gin_file=test.gin", *arguments)
        self.id, self.name = said.strip(), name
        assert self.id.isdigit()

    def wait(self, state: str) -> None:
        self.until(lambda: self.state() == state)

    def state(self) -> str:
        shown = output(self.environment, "scontrol", "show", "job", self.id)
        return shown.partition("JobState=")[2].partition(" ")[0]

    def until(self, condition) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.log(self.name)}"
            time.sleep(0.1)

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.out"
        return file.read_text() if file.exists() else ""

    def metrics(self, run: str) -> list[dict]:
        file = self.folder / run / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def facts(self, run: str) -> dict:
        return json.loads((self.folder / run / "environment.json").read_text())
