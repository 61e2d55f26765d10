"""A small model of experts learns text as the dense one of equal active size, evenly loaded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from olmo_jax.data.batch import Batch
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, abstract_model, parameters
from olmo_jax.parallel.mesh import MeshConfig, build_mesh
from olmo_jax.train.optimizer import OptimizerConfig
from olmo_jax.train.step import Trainer

TEXT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes(), np.uint8)
DENSE = ModelConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=2, mlp_width=128)
B, T, STEPS = 8, 64, 100


def train(config: ModelConfig) -> list[dict[str, float]]:
    model = abstract_model(config)
    trainer = Trainer(model, OptimizerConfig(), build_mesh(MeshConfig(fsdp=1)))
    state = trainer.init_state(lambda: parameters(Transformer(config, 0, model.kernels)))
    rng, out = np.random.default_rng(0), []
    for _ in range(STEPS):
        starts = rng.integers(0, len(TEXT) - T, B)
        rows = np.stack([TEXT[s : s + T + 1] for s in starts]).astype(np.int32) % 128
        batch = Batch(rows[:, :-1], rows[:, 1:], None, None, np.ones((B, T), bool), None)
        state, metrics = trainer.step(state, batch, np.float32(3e-3), np.float32(1.0))
        out.append({name: float(value) for name, value in metrics.items()})
    return out


@pytest.mark.slow
def test_four_experts_learn_as_the_dense_model_and_stay_balanced():
    moe = replace(
        DENSE, n_experts=4, experts_per_token=1, load_balancing_loss=0.01, router_z_loss=1.25e-4
    )
    dense, experts = train(DENSE), train(moe)

    def last(rows, name):
        return np.mean([row[name] for row in rows[-20:]])

    assert dense[0]["loss"] - last(dense, "loss") > 2
    assert last(experts, "loss") < last(dense, "loss") + 0.1
    assert last(experts, "load_balancing_loss") < 1.2
    assert last(experts, "expert_load_max") < 2
    assert last(experts, "expert_load_min") > 0.3
