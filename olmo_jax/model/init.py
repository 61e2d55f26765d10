"""Weights as a pure function of (seed, parameter path): the same on any mesh, in any order."""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class Initializer:
    """Makes every parameter of a model: its values, and its logical axis names."""

    def __init__(self, seed: int):
        self.key = jax.random.key(seed)

    def normal(
        self, path: str, shape: Sequence[int], axes: Sequence[str], std: float | Sequence[float]
    ) -> nnx.Param:
        """Truncated normal at 3 sigma; a sequence of stds gives one for each index of axis 0."""
        key = jax.random.fold_in(self.key, zlib.crc32(path.encode()))
        scale = jnp.asarray(std, jnp.float32).reshape(-1, *(1,) * (len(shape) - 1))
        draw = jax.random.truncated_normal(key, -3.0, 3.0, tuple(shape), jnp.float32)
        return nnx.Param(draw * scale, axes=tuple(axes))

    def constant(self, shape: Sequence[int], axes: Sequence[str], value: float) -> nnx.Param:
        """Every element the same (norm weights 1, biases 0)."""
        return nnx.Param(jnp.full(tuple(shape), value, jnp.float32), axes=tuple(axes))


def output_std(kind: str, init_std: float, fan_in: int, n_layers: int) -> list[float]:
    """Standard deviation of each layer's output projection (of attention and MLP).

    "mitchell" (OLMo 1) shrinks it with depth: 1 / sqrt(2 · fan_in · (l + 1)).
    """
    if kind == "mitchell":
        return [1 / math.sqrt(2 * fan_in * (layer + 1)) for layer in range(n_layers)]
    return [init_std] * n_layers


def input_std(kind: str, init_std: float, d_model: int) -> float:
    """Standard deviation of embedding, head, and projections from the residual stream."""
    return 1 / math.sqrt(d_model) if kind == "mitchell" else init_std
