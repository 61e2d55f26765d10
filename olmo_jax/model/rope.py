"""Rotary positions: the frequencies of each scaling, tables of cos and sin, and the rotation."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.model.config import ModelConfig


class RopeTables(NamedTuple):
    """cos and sin of every layer; both None where positions are not rotary."""

    full: tuple[jax.Array, jax.Array] | None
    """Of layers with full attention, scaled as the config says."""
    windowed: tuple[jax.Array, jax.Array] | None
    """Of layers with a window: never scaled (OLMo 3)."""

    def of(self, window: int) -> tuple[jax.Array, jax.Array] | None:
        """The tables of a layer with this window (0: full attention)."""
        return self.windowed if window else self.full


def rope_tables(config: ModelConfig, positions_BT: jax.Array) -> RopeTables:
    """Tables for these positions: each a pair of float32 (B, T, 1, rope_dim / 2)."""
    if config.position != "rope":
        return RopeTables(None, None)

    def table(frequency: np.ndarray, factor: float) -> tuple[jax.Array, jax.Array]:
        angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency.astype(np.float32)
        if factor == 1:
            return jnp.cos(angle), jnp.sin(angle)
        return factor * jnp.cos(angle), factor * jnp.sin(angle)

    plain = table(_plain_frequency(config), 1.0)
    if config.rope_scaling == "none":
        return RopeTables(plain, plain)
    return RopeTables(table(scaled_frequency(config), attention_factor(config)), plain)


def _plain_frequency(config: ModelConfig) -> np.ndarray:
    # On the host, in float64: a power is not the same on every device.
    return config.rope_theta ** (-np.arange(0, config.rope_dim, 2) / config.rope_dim)


def scaled_frequency(config: ModelConfig) -> np.ndarray:
    """Radians a token of each pair of dimensions, (rope_dim / 2,), on full-attention layers.

    "linear": all divided by the factor (Chen et al. 2023). "llama3": by wavelength, with a smooth
    step between two (Llama 3.1). "yarn": by the number of rotations in the original context, with
    a linear ramp over the dimensions (Peng et al. 2023, "NTK by parts").
    """
    plain = _plain_frequency(config)
    divided = plain / config.rope_factor
    match config.rope_scaling:
        case "none":
            return plain
        case "linear":
            return divided
        case "llama3":
            rotations = _original_context(config) * plain / (2 * math.pi)
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            kept = np.clip((rotations - low) / (high - low), 0, 1)
        case "yarn":
            first, last = (
                _dimension_of(config, rotations)
                for rotations in (config.rope_beta_fast, config.rope_beta_slow)
            )
            first = max(math.floor(first), 0)
            last = min(math.ceil(last), config.rope_dim - 1)
            ramp = (np.arange(len(plain)) - first) / max(last - first, 1e-3)
            kept = 1 - np.clip(ramp, 0, 1)
    return kept * plain + (1 - kept) * divided


def attention_factor(config: ModelConfig) -> float:
    """What cos and sin of full-attention layers are multiplied with (YaRN's; else 1)."""
    if config.rope_scaling != "yarn":
        return 1.0
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    return 0.1 * math.log(config.rope_factor) + 1.0


def _dimension_of(config: ModelConfig, rotations: float) -> float:
    """The index, not rounded, of the pair that turns this often in the original context."""
    turn = _original_context(config) / (rotations * 2 * math.pi)
    return config.rope_dim * math.log(turn) / (2 * math.log(config.rope_theta))


def _original_context(config: ModelConfig) -> int:
    assert config.rope_original_context is not None  # ModelConfig sees to it
    return config.rope_original_context


def rotate(x_BTHC: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary positions in half-split layout on the first 2 · cos.shape[-1] dims of each head.

    Over the whole width of a head: a TPU keeps arrays of half a head's 64 dims in 128 lanes each,
    which at T 8192 with 32 heads was 134 MB for every half.
    """
    cos, sin = rope
    half, C = cos.shape[-1], x_BTHC.shape[-1]
    a, b, rest = jnp.split(x_BTHC, (half, 2 * half), axis=-1)
    swapped = jnp.concatenate([b, a, rest], axis=-1)
    still = [(0, 0)] * 3 + [(0, C - 2 * half)]
    cos = jnp.pad(jnp.concatenate([cos, cos], axis=-1), still, constant_values=1)
    sin = jnp.pad(jnp.concatenate([-sin, sin], axis=-1), still)
    out = x_BTHC.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin
    return out.astype(x_BTHC.dtype)
