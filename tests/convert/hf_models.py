"""Tiny models with weights that make every choice of the architecture matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, bind, init, parameters

OLMO2 = ModelConfig(
    vocab_size=250,
    embedding_rows=256,
    d_model=64,
    n_layers=3,
    n_heads=4,
    mlp_width=96,
    context_length=64,
)
OLMO1 = dataclasses.replace(
    OLMO2,
    norm="layer_nonparametric",
    norm_eps=1e-5,
    norm_place="pre",
    qk_norm=False,
    rope_theta=1e4,
    init="mitchell",
)
# Windows and original contexts are shorter than the sequences, and YaRN's ramp crosses the head.
OLMO3 = dataclasses.replace(OLMO2, n_layers=4, n_kv_heads=2, window_pattern=(5, 5, 5, 0))
OLMO3_LONG = dataclasses.replace(
    OLMO3,
    n_heads=2,
    n_kv_heads=None,
    rope_theta=100.0,
    rope_scaling="yarn",
    rope_factor=8.0,
    rope_original_context=32,
    rope_beta_fast=2.0,
    rope_beta_slow=0.25,
)
PRE_NORM = dict(norm_place="pre", qk_norm=False)
PYTHIA = dataclasses.replace(
    OLMO2,
    norm="layer",
    norm_eps=1e-5,
    bias=True,
    parallel_residual=True,
    mlp="gelu",
    rope_theta=1e4,
    rope_fraction=0.25,
    init="small",
    **PRE_NORM,
)
LLAMA = dataclasses.replace(
    OLMO2,
    n_kv_heads=2,
    head_dim=24,
    rope_theta=100.0,
    rope_scaling="llama3",
    rope_factor=4.0,
    rope_original_context=32,
    **PRE_NORM,
)
MPT = dataclasses.replace(
    OLMO2,
    d_model=48,
    n_heads=6,  # no power of two
    mlp_width=192,
    init_std=0.1,
    norm="layer",
    norm_eps=1e-5,
    mlp="gelu",
    position="alibi",
    tie_embeddings=True,
    **PRE_NORM,
)
FLEX = dataclasses.replace(OLMO2, mlp_width=32, n_experts=5, experts_per_token=3)
OLMOE = dataclasses.replace(
    OLMO2,
    mlp_width=32,
    n_experts=5,
    experts_per_token=2,
    load_balancing_loss=0.01,
    norm_eps=1e-5,
    norm_place="pre",
    rope_theta=1e4,
)
VARIANTS = {
    "olmo1": OLMO1,
    "olmo1 tied": dataclasses.replace(OLMO1, tie_embeddings=True),
    "olmo1 clip": dataclasses.replace(OLMO1, clip_qkv=0.4),  # binds: see test
    "olmo2": OLMO2,
    "olmo2 gqa": dataclasses.replace(OLMO2, n_kv_heads=2),
    "olmo3": OLMO3,
    "olmo3 long": OLMO3_LONG,
    "pythia": PYTHIA,
    "pythia tanh": dataclasses.replace(PYTHIA, mlp="gelu_tanh"),
    "neox in sequence": dataclasses.replace(PYTHIA, parallel_residual=False),
    "llama": LLAMA,
    "llama linear tied": dataclasses.replace(
        LLAMA, rope_scaling="linear", tie_embeddings=True, head_dim=None
    ),
    "mpt": MPT,
    "olmoe": OLMOE,
    "olmoe normalized": dataclasses.replace(OLMOE, normalize_expert_weights=True, n_kv_heads=2),
    "flex olmo": FLEX,
    "mpt clip": dataclasses.replace(MPT, clip_qkv=0.4),
}
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 48))


def perturbed(config: ModelConfig) -> Transformer:
    """Random weights, each with noise of 0.2 relative to its scale (a norm's weight is 1; a bias,
    which begins at 0, gets 0.1)."""
    model = init(config)
    leaves, structure = jax.tree.flatten(parameters(model))
    keys = jax.random.split(jax.random.key(1), len(leaves))

    def scale(a):
        return jnp.sqrt(jnp.mean(jnp.square(a))) if jnp.any(a) else 0.5

    noisy = [
        a + 0.2 * scale(a) * jax.random.normal(k, a.shape)
        for a, k in zip(leaves, keys, strict=True)
    ]
    return bind(model, jax.tree.unflatten(structure, noisy))
