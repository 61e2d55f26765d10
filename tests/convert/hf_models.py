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
VARIANTS = {
    "olmo1": OLMO1,
    "olmo1 tied": dataclasses.replace(OLMO1, tie_embeddings=True),
    "olmo1 clip": dataclasses.replace(OLMO1, clip_qkv=0.4),  # binds: see test
    "olmo2": OLMO2,
    "olmo2 gqa": dataclasses.replace(OLMO2, n_kv_heads=2),
}
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 48))


def perturbed(config: ModelConfig) -> Transformer:
    """Random weights, each with noise of 0.2 relative to its scale (a norm's weight is 1)."""
    model = init(config)
    leaves, structure = jax.tree.flatten(parameters(model))
    keys = jax.random.split(jax.random.key(1), len(leaves))

    def scale(a):
        return jnp.sqrt(jnp.mean(jnp.square(a)))

    noisy = [
        a + 0.2 * scale(a) * jax.random.normal(k, a.shape)
        for a, k in zip(leaves, keys, strict=True)
    ]
    return bind(model, jax.tree.unflatten(structure, noisy))
