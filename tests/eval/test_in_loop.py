"""Tasks while a model trains: on one device, on meshes, and in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import olmo_jax.cli as cli
from olmo_jax.report.report import write_report

ROOT = Path(__file__).parents[2]
GIN = """
Model.vocab_size = 600
Model.d_model = 16
Model.n_layers = 2
Model.n_heads = 2
Model.mlp_width = 32
Model.context_length = 128
Schedule.kind = "constant"
Data.sequence_length = 16
Data.batch_size = 8
Data.eos_token_id = 0
Train.steps = 4
Train.heldout_every = 2
Train.tensorboard = False
Train.evaluators = ("arc_easy_rc_0shot", "piqa_rc_0shot:bpb")
Train.evaluators_limit = 5
"""


@pytest.fixture
def gin(tmp_path, tokenizer_file):
    np.random.default_rng(0).integers(0, 600, 4000).astype(np.uint16).tofile(tmp_path / "t.npy")
    lines = f'Data.paths = ("{tmp_path}/t.npy",)\nTrain.tokenizer = "{tokenizer_file}"\n'
    (tmp_path / "t.gin").write_text(GIN + lines)
    return tmp_path / "t.gin"


def evaluations(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/arc_easy_rc_0shot/acc" in row]


def test_metrics_and_the_report(gin, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", f"--gin_file={gin}", f"--gin.Train.run_dir={run}"]
    assert cli.run(command) == 0
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [2, 4]
    names = {"acc", "len_norm", "per_byte", "bpb", "ce_loss", "soft", "soft_log"}
    assert {f"eval/arc_easy_rc_0shot/{name}" for name in names} <= set(rows[0])
    assert rows[0]["eval/piqa_rc_0shot:bpb/bpb"] != rows[1]["eval/piqa_rc_0shot:bpb/bpb"]
    page = write_report(run).read_text()
    assert "<h2>Evaluation</h2>" in page and "arc_easy_rc_0shot" in page
    assert f"{rows[1]['eval/piqa_rc_0shot:bpb/bpb']:.4f}" in page

    # The same numbers from the checkpoint, offline.
    capsys.readouterr()
    out = tmp_path / "r.json"
    tasks = "--tasks=arc_easy_rc_0shot,piqa_rc_0shot:bpb"
    assert cli.run(["eval", str(run), tasks, "--limit=5", f"--out={out}"]) == 0
    offline = json.loads(out.read_text())["tasks"]["piqa_rc_0shot:bpb"]["metrics"]["bpb"]
    assert offline == pytest.approx(rows[1]["eval/piqa_rc_0shot:bpb/bpb"], rel=1e-5)


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ('Train.evaluators=("arc_esy",)', "did you mean arc_easy"),
        ("Train.tokenizer=None", "Train.tokenizer is not"),
        ("Train.evaluators_limit=0", "at least 1"),
    ],
)
def test_refused_before_training(gin, tmp_path, binding, words, capsys):
    run = tmp_path / "run"
    command = ["train", f"--gin_file={gin}", f"--gin.Train.run_dir={run}", f"--gin.{binding}"]
    assert cli.run(command) == 2
    assert words in capsys.readouterr().err and not run.exists()


@pytest.mark.slow
def test_a_mesh_scores_as_one_device():
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    cases = [
        "window:data=2,fsdp=2,tensor=2",
        "window:context=2,fsdp=4",
        "alibi:tensor=4,fsdp=2",
        "experts:expert=4,fsdp=2",
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mesh_worker.py")), *cases],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [f"equal {case}" for case in cases]


@pytest.mark.slow
def test_two_processes(gin, tmp_path):
    command = [sys.executable, "-m", "olmo_jax.cli"]
    for run, launch in (("one", []), ("two", ["launch", "local", "--processes=2", "--"])):
        arguments = ["train", f"--gin_file={gin}", f"--gin.Train.run_dir={tmp_path / run}"]
        done = subprocess.run(
            [*command, *launch, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    assert [row["step"] for row in two] == [2, 4]
    for a, b in zip(one, two, strict=True):
        name = "eval/piqa_rc_0shot:bpb/bpb"
        assert b[name] == pytest.approx(a[name], rel=1e-4)
