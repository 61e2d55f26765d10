"""The benchmark runs, writes its figures, and compares like with like."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_generation_is_measured_on_the_same_tokens(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--only=generate", "--shape=tiny"]
    command += ["--rounds=1", f"--out={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    result = json.loads((tmp_path / "generate.json").read_text())
    for batch in ("batch_1", "batch_16"):
        assert result["tiny"][batch]["same_tokens"]
        assert result["tiny"][batch]["ratio"] > 0
    assert {"date", "torch", "transformers", "environment", "command"} <= set(result)


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_runs_without_one(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--shape=demo", "--only=generate"]
    command += [f"--out={tmp_path / 'gpu.json'}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert len(figures) == 4 and all(f["tokens_per_second"] > 0 for f in figures.values()), figures


@pytest.mark.slow
def test_the_server_is_measured_with_one_client_and_with_sixteen(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--only=serve", "--shape=tiny", "--rounds=1"]
    command += [f"--out={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    result = json.loads((tmp_path / "serve.json").read_text())
    one, sixteen = (result["tokens_per_second"][clients] for clients in ("1", "16"))
    assert one > 0 and result["ratio"] == pytest.approx(sixteen / one)


@pytest.mark.slow
def test_scoring_is_measured_on_the_same_requests(tmp_path):
    """The vocabulary of the tiny shape is too small for a byte-level tokenizer: the demo's."""
    command = [sys.executable, "-m", "benchmarks", "--only=score", "--shape=demo"]
    command += ["--rounds=1", f"--out={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    result = json.loads((tmp_path / "score.json").read_text())
    assert result["largest_difference"] < 1e-3
    assert result["requests"] >= 4 * 45 and result["ratio"] > 0


def convert_result(tmp_path, shape):
    command = [sys.executable, "-m", "benchmarks", "--only=convert", f"--shape={shape}"]
    command += ["--rounds=1", f"--out={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    return json.loads((tmp_path / "convert.json").read_text())


@pytest.mark.slow
def test_conversion_keeps_the_bytes_and_its_memory_does_not_grow_with_depth(tmp_path):
    """As deep again, 400 MB more weights: neither way may take even a fifth of that more.

    The shallow model is 400 MB too, so that it fills what may be in flight (64 MiB) as the deep one
    does. The 24 to 53 MB by which to_orbax was seen to grow are glibc's: with a fixed
    MALLOC_MMAP_THRESHOLD_ four times the depth took 2 to 16 MB more.
    """
    shallow, deep = (convert_result(tmp_path, shape) for shape in ("16 layers", "32 layers"))
    assert shallow["same_bytes"] and deep["same_bytes"]
    grown = (deep["bytes"] - shallow["bytes"]) / 1e6
    assert grown > 400
    assert deep["load_and_save"]["seconds"] > 0
    for way in ("to_orbax", "to_hf"):
        more = deep[way]["peak_anonymous_mb"] - shallow[way]["peak_anonymous_mb"]
        assert more < grown / 5
