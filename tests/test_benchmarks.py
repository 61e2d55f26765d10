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
    assert result["tiny"]["same_tokens"]
    assert result["tiny"]["ratio"] > 0
    assert {"date", "torch", "transformers", "environment", "command"} <= set(result)
