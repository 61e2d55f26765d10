"""OLMo 3 with windows and YaRN: the logits are those of OLMo-core, which trained it.

tests/oracles/make_olmo3_yarn.py made the weights and the logits.
"""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import abstract_model, bind, parameters

ORACLE = Path(__file__).parents[1] / "oracles" / "olmo3_yarn.npz"
CONFIG = ModelConfig(
    vocab_size=64,
    embedding_rows=64,
    d_model=32,
    n_layers=4,
    n_heads=2,
    n_kv_heads=1,
    mlp_width=96,
    context_length=512,
    rope_theta=100.0,
    rope_scaling="yarn",
    rope_factor=8.0,
    rope_original_context=64,
    rope_beta_fast=4.0,
    rope_beta_slow=1.0,
    window_pattern=(16, 16, 16, 0),
)
NAMES = {
    "embed": "embeddings",
    "lm_head": "lm_head.w_out",
    "final_norm": "lm_head.norm",
    "layers.attention.q": "blocks.{}.attention.w_q",
    "layers.attention.k": "blocks.{}.attention.w_k",
    "layers.attention.v": "blocks.{}.attention.w_v",
    "layers.attention.out": "blocks.{}.attention.w_out",
    "layers.attention.q_norm": "blocks.{}.attention.q_norm",
    "layers.attention.k_norm": "blocks.{}.attention.k_norm",
    "layers.attention_norm": "blocks.{}.attention_norm",
    "layers.mlp.gate": "blocks.{}.feed_forward.w1",
    "layers.mlp.down": "blocks.{}.feed_forward.w2",
    "layers.mlp.up": "blocks.{}.feed_forward.w3",
    "layers.mlp_norm": "blocks.{}.feed_forward_norm",
}


@pytest.fixture(scope="module")
def oracle():
    with np.load(ORACLE) as file:
        return dict(file)


def error(config: ModelConfig, oracle) -> float:
    """The largest difference of a logit, relative to the largest logit."""

    def weight(keys, _):
        path = ".".join(key.key for key in keys[:-1])
        layers = range(config.n_layers) if path.startswith("layers") else [None]
        theirs = [oracle[NAMES[path].format(layer) + ".weight"] for layer in layers]
        ours = [a if path == "embed" else a.T for a in theirs]
        return np.stack(ours) if len(ours) > 1 else ours[0]

    model = abstract_model(config)
    model = bind(model, jax.tree.map_with_path(weight, parameters(model)))
    logits = np.asarray(model(oracle["tokens"].astype(np.int32)))
    return np.abs(logits - oracle["logits"]).max() / np.abs(oracle["logits"]).max()


def test_the_logits_are_olmo_cores(oracle):
    assert oracle["tokens"].shape[1] > CONFIG.rope_original_context > max(CONFIG.windows)
    assert error(CONFIG, oracle) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_factor": 8.1},
        {"rope_attention_factor": 1.0},
        {"rope_beta_fast": 8.0},
        {"rope_beta_slow": 0.5},
        {"rope_original_context": 128},
        {"window_pattern": (15, 15, 15, 0)},
        {"window_pattern": (17, 17, 17, 0)},
        {"rope_scaling": "none", "rope_factor": 1.0},
    ],
    ids=str,
)
def test_the_comparison_notices_a_change(oracle, changes):
    assert error(replace(CONFIG, **changes), oracle) > 1e-4
