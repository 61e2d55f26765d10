"""A dry run's text: the published sizes and plans, without allocating any of it."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from olmo_jax.config import load_config
from olmo_jax.train.dry_run import describe

ROOT = Path(__file__).parents[2]


def lines(*bindings: str, gin_file: str = "configs/olmo2/7b.gin") -> dict[str, str]:
    run = load_config([str(ROOT / gin_file)], ["Data.paths=('tokens.npy',)", *bindings])
    return dict(line.split(":", 1) for line in describe(run).splitlines())


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_olmo_2_7b_as_published():
    text = lines()
    assert "7,298,617,344" in text["parameters"]
    assert "4,194,304 (1,024 instances of 4,096)" in text["tokens a step"]
    assert text["steps"].split() == ["928,646"]
    # 6 * (7,298,617,344 - 100,352 * 4,096) + 12 * 32 * 32 * 128 * 4,096
    assert text["FLOPs a token"].split()[0] == "4.777e+10"


def test_a_plan_in_tokens_and_a_batch_schedule():
    text = lines(
        "Train.steps=None",
        "Train.tokens=16_384_000",
        "Train.stop_at=3",
        "Data.batch_size=1000",
        "Data.batch_size_schedule=((2, 2000),)",
    )
    assert text["steps"].split() == ["3,", "stopping", "at", "3"]
    assert "4,096,000 to 8,192,000 (1,000 to 2,000 instances" in text["tokens a step"]
    assert text["tokens"].strip() == "16,384,000"


def test_a_mesh_that_does_not_fit_is_told_and_not_raised():
    platform, count = jax.devices()[0].device_kind, jax.device_count()
    axes = f"fsdp {count}" if count > 1 else "one device"
    assert lines()["mesh"].strip() == f"{axes} ({count} x {platform})"
    assert "does not fit this machine" in lines("Mesh.fsdp=4096")["mesh"]


def test_no_weight_is_allocated():
    code = """
import glob, resource
from olmo_jax.config import load_config
from olmo_jax.train.dry_run import describe
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
describe(load_config(["configs/demo.gin"]))
before = peak()
for path in glob.glob("configs/olmo2/*b.gin"):
    describe(load_config([path], ["Data.paths=('tokens.npy',)"]))
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # MiB; the smallest of them has 5,700
