"""Each backend's real compiler on a tiny model, where it is installed (no device is needed).

Skipped where libtpu or the CUDA plugin is missing (the extra `aot`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from olmo_jax.errors import UserError
from olmo_jax.plan.targets import parse_target, require_compiler

ROOT = Path(__file__).parents[2]
TINY = (
    "--gin.Model.vocab_size=1024",
    "--gin.Model.d_model=512",
    "--gin.Model.n_layers=4",
    "--gin.Model.n_heads=4",
    "--gin.Model.mlp_width=1024",
    "--gin.Model.compute_dtype=bfloat16",
    "--gin.Data.sequence_length=1024",
    "--gin.Data.eos_token_id=0",
    "--gin.Train.steps=10",
    "--gin.Schedule.warmup=2",
)
OLMO2_1B = ("--gin_file=configs/olmo2/1b.gin",)


def plan(tmp_path, target, *arguments, model=TINY):
    """`olmo-jax plan` in a process of its own; its JSON."""
    try:
        require_compiler(parse_target(target))
    except UserError as missing:
        pytest.skip(str(missing))
    gin = tmp_path / "empty.gin"
    gin.write_text("")
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "olmo_jax.cli", "plan", f"--gin_file={gin}", *model]
    done = subprocess.run(
        [*command, f"--target={target}", f"--json={out}", "--no_cache", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())[0]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "remat"), [("v5e-4", "full"), ("h100-4", "full"), ("h100-4", "none")]
)
def test_a_tiny_run_on_each_backend(tmp_path, target, remat):
    o = plan(tmp_path, target, "--batch=4", f"--remat={remat}", f"--html={tmp_path / 'p.html'}")
    weights = o["memory"]["parameters"]
    assert weights == pytest.approx(4 * o["parameters"] / 4, rel=0.01)  # float32 over 4 devices
    assert o["memory"]["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert o["fits"] and o["memory"]["temporaries"] > 0
    # The compiled program's products are its share of the traced one's: no device does another's.
    products = (o["flops"] - o["flops_kernels"]) / o["devices"]
    assert o["products_compiled"] == pytest.approx(products, rel=0.05)
    assert o["flops_kernels"] > 0, o["notes"]
    # Weights are gathered in bfloat16 twice and gradients scattered at least once.
    assert o["collective_bytes"]["fsdp"] > 3 * 2 * o["parameters"] * 3 / 4 * 0.9
    assert o["bound_seconds"] == max(o["bound"].values()) and 0 < o["mfu"] < 1
    page = (tmp_path / "p.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.aot
def test_memory_is_what_a_gpu_took(tmp_path):
    """1.6 % came after the measurement (docs/plan.md), and 0.8 % by jax 0.10.2: it was 0.11.2's."""
    took = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())
    figures = took["figures"]["train: olmo_jax, rows of 8 documents"]
    o = plan(tmp_path, "h200-1", f"--batch={took['rows']}", "--remat=none", model=OLMO2_1B)
    assert o["sequence_length"] == took["length"]
    assert o["memory_needed"] == pytest.approx(figures["peak_memory_gb"] * 1e9, rel=0.03)
    assert o["bound_seconds"] < figures["seconds"]


@pytest.mark.aot
def test_slices_meet_over_the_network(tmp_path):
    unknown = "--gin.Train.xla_flags=('xla_nonsense=1',)"
    o = plan(tmp_path, "2xv5e-4", "--batch=8", "--remat=full", unknown)
    assert o["mesh"]["slice"] == 2 and o["bound"]["outside"] > 0
    # A run's own flags all reach this one compilation, but the one that no compiler knows.
    assert [note for note in o["notes"] if note.endswith(": xla_nonsense")], o["notes"]
    assert any("slice" in axis for axis in o["collective_bytes"])


@pytest.mark.aot
def test_what_does_not_fit_says_by_how_much(tmp_path):
    o = plan(tmp_path, "v5e-1", "--batch=256", "--gin.Model.d_model=1024", "--remat=none")
    assert not o["fits"] and o["memory_needed"] > o["memory_there"]
