"""Weights as a pure function of (seed, parameter path): the same on any mesh, in any order."""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from olmo_jax.model.config import ModelConfig


class Initializer:
    """Makes every parameter of a model: its values, and its logical axis names."""

    def __init__(self, seed: int, *, truncated: bool = True):
        self.key = jax.random.key(seed)
        self.truncated = truncated

    def normal(
        self, path: str, shape: Sequence[int], axes: Sequence[str], std: float | Sequence[float]
    ) -> nnx.Param:
        """Normal, cut at 3 sigma if `truncated`; a sequence of stds gives one for each index of
        axis 0."""
        key = jax.random.fold_in(self.key, zlib.crc32(path.encode()))
        scale = jnp.asarray(std, jnp.float32).reshape(-1, *(1,) * (len(shape) - 1))
        if self.truncated:
            draw = jax.random.truncated_normal(key, -3.0, 3.0, tuple(shape), jnp.float32)
        else:
            draw = jax.random.normal(key, tuple(shape), jnp.float32)
        return nnx.Param(draw * scale, axes=tuple(axes))

    def constant(self, shape: Sequence[int], axes: Sequence[str], value: float) -> nnx.Param:
        """Every element the same (norm weights 1, biases 0)."""
        return nnx.Param(jnp.full(tuple(shape), value, jnp.float32), axes=tuple(axes))


def output_std(config: ModelConfig, fan_in: int) -> list[float]:
    """Standard deviation of each layer's output projection (of attention and MLP).

    "mitchell" (OLMo 1) shrinks it with depth: 1 / sqrt(2 · fan_in · (l + 1)). "small" and "scaled"
    are GPT-NeoX's `wang_init` and `scaled_normal`.
    """
    layers = config.n_layers
    match config.init:
        case "mitchell":
            return [1 / math.sqrt(2 * fan_in * (layer + 1)) for layer in range(layers)]
        case "small":
            return [2 / (layers * math.sqrt(config.d_model))] * layers
        case "scaled":
            return [config.init_std / math.sqrt(2 * layers)] * layers
    return [config.init_std] * layers


def input_std(config: ModelConfig) -> float:
    """Standard deviation of embedding, head, and projections from the residual stream ("small" is
    GPT-NeoX's `small_init`: Nguyen and Salazar 2019)."""
    match config.init:
        case "mitchell":
            return 1 / math.sqrt(config.d_model)
        case "small":
            return math.sqrt(2 / (5 * config.d_model))
    return config.init_std
