"""The released dense OLMo models as functions that return a `ModelConfig`; numbers as published."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig


def _olmo1(**choices) -> ModelConfig:
    fields: dict[str, Any] = dict(
        vocab_size=50280,
        embedding_rows=50304,
        context_length=2048,
        norm="layer_nonparametric",
        norm_eps=1e-5,
        norm_place="pre",
        qk_norm=False,
        rope_theta=1e4,
        init="mitchell",
    )
    return ModelConfig(**(fields | choices))


def _olmo2(**choices) -> ModelConfig:
    return ModelConfig(vocab_size=100278, embedding_rows=100352, context_length=4096, **choices)


def olmo1_1b() -> ModelConfig:
    """OLMo 1B (February 2024), the only one with tied embeddings."""
    return _olmo1(d_model=2048, n_layers=16, n_heads=16, mlp_width=8192, tie_embeddings=True)


def olmo1_7b() -> ModelConfig:
    """OLMo 7B (February 2024)."""
    return _olmo1(d_model=4096, n_layers=32, n_heads=32, mlp_width=11008)


def olmo1_1b_0724() -> ModelConfig:
    """OLMo 1B 0724: longer context, clipped q, k, v, untied."""
    return replace(olmo1_1b(), context_length=4096, clip_qkv=8.0, tie_embeddings=False)


def olmo1_7b_0424() -> ModelConfig:
    """OLMo 7B 0424 (OLMo 1.7): longer context and clipped q, k, v."""
    return replace(olmo1_7b(), context_length=4096, clip_qkv=8.0)


def olmo2_1b() -> ModelConfig:
    """OLMo 2 1B 0425 (OLMo-core's `olmo2_1B_v2`)."""
    return _olmo2(d_model=2048, n_layers=16, n_heads=16, mlp_width=8192)


def olmo2_7b() -> ModelConfig:
    """OLMo 2 7B 1124."""
    return _olmo2(d_model=4096, n_layers=32, n_heads=32, mlp_width=11008)


def olmo2_13b() -> ModelConfig:
    """OLMo 2 13B 1124."""
    return _olmo2(d_model=5120, n_layers=40, n_heads=40, mlp_width=13824)


def olmo2_32b() -> ModelConfig:
    """OLMo 2 32B 0325, the only dense OLMo 2 with grouped-query attention."""
    return _olmo2(d_model=5120, n_layers=64, n_heads=40, n_kv_heads=8, mlp_width=27648)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    f.__name__: f
    for f in (
        olmo1_1b,
        olmo1_1b_0724,
        olmo1_7b,
        olmo1_7b_0424,
        olmo2_1b,
        olmo2_7b,
        olmo2_13b,
        olmo2_32b,
    )
}


def preset(name: str) -> ModelConfig:
    """The configuration of a released model by name; UserError names the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown preset {name!r}: {hint}allowed are {', '.join(PRESETS)}")
    return PRESETS[name]()
