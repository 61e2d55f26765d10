"""Twenty AdamW steps from the same weights on the same batches, ours and a PyTorch loop's.

Losses agree to 1e-4 at every step, in float32: the two sum in another order, and AdamW divides
small differences by small roots.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from olmo_jax.checkpoint import CheckpointConfig, Checkpointer
from olmo_jax.convert.export import convert
from olmo_jax.data.batch import Batch
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import init, parameters
from olmo_jax.parallel.mesh import MeshConfig, build_mesh
from olmo_jax.train.optimizer import OptimizerConfig
from olmo_jax.train.step import Trainer

CONFIG = ModelConfig(
    vocab_size=128, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, mlp_width=96, init_std=0.1
)
RATE, STEPS = 3e-3, 20
ROWS = np.random.default_rng(0).integers(0, 128, (STEPS, 4, 33))


def our_losses(model, weight_decay):
    optimizer = OptimizerConfig(weight_decay=weight_decay, decay_embeddings=True)
    trainer = Trainer(model, optimizer, build_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    state = trainer.init_state(jax.tree.map(np.asarray, parameters(model)))
    losses = []
    for rows in ROWS.astype(np.int32):
        tokens, targets = rows[:, :-1], rows[:, 1:]
        batch = Batch(tokens, targets, None, None, np.ones(tokens.shape, bool), None)
        state, metrics = trainer.step(state, batch, np.float32(RATE), np.float32(1.0))
        losses.append(float(metrics["loss"]))
    return losses


def torch_losses(model):
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    losses = []
    for rows in torch.tensor(ROWS):
        logits = model(rows[:, :-1]).logits
        targets = rows[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    model = init(CONFIG)
    config = {"Model": dataclasses.asdict(CONFIG), "Data": {}}
    (folder / "checkpoints").mkdir()
    with Checkpointer(folder / "checkpoints", CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {"params": parameters(model)}, {"config": config})
    convert(folder, folder / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    return model, torch_losses(theirs)


def test_twenty_steps_have_the_losses_of_a_torch_loop(both):
    model, expected = both
    np.testing.assert_allclose(our_losses(model, weight_decay=0.1), expected, atol=1e-4)


def test_the_comparison_fails_without_weight_decay(both):
    model, expected = both
    assert np.abs(np.array(our_losses(model, weight_decay=0.0)) - expected).max() > 1e-4
