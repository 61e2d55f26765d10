"""Training on the device: as on the host's CPU, and resumed bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from olmo_jax.checkpoint import CheckpointReader
from olmo_jax.data.batch import Batch
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, abstract_model, kernels_for, parameters
from olmo_jax.parallel.mesh import MeshConfig, build_mesh
from olmo_jax.train.optimizer import OptimizerConfig
from olmo_jax.train.step import Trainer

pytestmark = pytest.mark.device
ROOT = Path(__file__).parents[2]

SHAPE = {"vocab_size": 512, "d_model": 128, "n_layers": 4, "n_heads": 4, "mlp_width": 256}
MODELS = {
    "olmo2": ModelConfig(**SHAPE, n_kv_heads=2),
    "olmo3": ModelConfig(**SHAPE, window_pattern=(64, 64, 64, 0)),
    "remat": ModelConfig(**SHAPE, remat="projections"),
    "olmoe": ModelConfig(
        **SHAPE, n_experts=8, experts_per_token=2, load_balancing_loss=0.01, router_z_loss=1e-3
    ),
    "pythia": ModelConfig(
        **SHAPE, norm="layer", norm_place="pre", bias=True, mlp="gelu", parallel_residual=True
    ),
}
B, T, STEPS = 4, 256, 3


def batches() -> list[Batch]:
    rng, made = np.random.default_rng(0), []
    for _ in range(STEPS):
        rows = rng.integers(0, 512, (B, T + 1), np.int32)
        rows[:, 1::2] = rows[:, :-1:2]  # something to learn
        ids = np.sort(rng.integers(1, 6, (B, T)), axis=1).astype(np.int32)
        starts = np.diff(ids, axis=1, prepend=0) != 0
        index = np.arange(T, dtype=np.int32)
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        mask = np.ones((B, T), np.bool_)
        made.append(Batch(rows[:, :-1], rows[:, 1:], ids, positions.astype(np.int32), mask, None))
    return made


def train(config: ModelConfig, device) -> np.ndarray:
    """(loss, gradient norm) of every step, from weights made on the CPU."""
    model = abstract_model(config, kernels_for(config, device))
    trainer = Trainer(model, OptimizerConfig(), build_mesh(MeshConfig(), [device]))
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.device_get(parameters(Transformer(config, 0)))
    state, rows = trainer.init_state(params), []
    for batch in batches():
        state, metrics = trainer.step(state, batch, np.float32(1e-3), np.float32(1.0))
        rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(rows)


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_the_cpu(name, device, cpu):
    config = MODELS[name]
    exact = ModelConfig(**{**vars(config), "compute_dtype": "float32"})
    want = train(exact, cpu)
    with jax.default_matmul_precision("highest"):
        got = train(exact, device)
    np.testing.assert_allclose(got, want, rtol=2e-4)
    rounded = train(ModelConfig(**{**vars(config), "compute_dtype": "bfloat16"}), device)
    np.testing.assert_allclose(rounded[:, 0], want[:, 0], rtol=5e-3)
    np.testing.assert_allclose(rounded[:, 1], want[:, 1], rtol=5e-2)


GIN = """
Model.vocab_size = 512
Model.d_model = 128
Model.n_layers = 4
Model.n_heads = 4
Model.mlp_width = 256
Data.sequence_length = 256
Data.batch_size = 4
Data.eos_token_id = 0
Schedule.warmup = 2
Train.steps = 12
Train.deterministic = True
Checkpoint.every = 6
"""


def test_a_resumed_run_is_bit_identical(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 512, 40_000).astype(np.uint16)
    tokens[::90] = 0
    tokens.tofile(tmp_path / "tokens.npy")
    (tmp_path / "run.gin").write_text(GIN + f'Data.paths = ("{tmp_path}/tokens.npy",)\n')

    def run(folder: str, *bindings: str) -> None:
        command = [sys.executable, "-m", "olmo_jax.cli", "train", f"--gin_file={tmp_path}/run.gin"]
        command += [f"--gin.Train.run_dir={tmp_path / folder}", *bindings]
        done = subprocess.run(
            command,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    run("whole")
    run("parts", "--gin.Train.stop_at=6")
    run("parts")
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    )
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in parts if "loss" in r] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in whole if "loss" in r
    ]
    for item in ("params", "train_state"):
        ends = [
            CheckpointReader(tmp_path / name / "checkpoints").tensors(12, item)
            for name in ("whole", "parts")
        ]
        for name in ends[0]:
            np.testing.assert_array_equal(*(e[name].read().result() for e in ends), err_msg=name)
