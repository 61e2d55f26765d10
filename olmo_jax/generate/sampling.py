"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, repetition penalty.

What a request asks for is a row of arrays, so that all kinds share one program; an operation that
no row asks for is skipped at run time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from olmo_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults take the likeliest and cut nothing off."""

    temperature: float = 0.0
    """What logits are divided by; 0 takes the likeliest."""
    top_k: int | None = None
    """Only the likeliest so many."""
    top_p: float = 1.0
    """Only the fewest likeliest whose probabilities reach this (nucleus sampling, Holtzman et al.
    2020), after the temperature and top_k."""
    min_p: float = 0.0
    """Only those with at least this share of the likeliest's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """What positive logits of tokens that prompt or text have are divided by, and negative ones
    multiplied with, before all else (CTRL, Keskar et al. 2019)."""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p = {self.min_p}: it must be from 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty = {self.repetition_penalty}: it must be above 0")


GREEDY = Sampling()


class SamplingRows(NamedTuple):
    """A `Sampling` and a seed for each row."""

    temperature_B: np.ndarray
    top_k_B: np.ndarray
    top_p_B: np.ndarray
    min_p_B: np.ndarray
    penalty_B: np.ndarray
    seed_B: np.ndarray

    @staticmethod
    def of(rows: Sequence[tuple[Sampling, int]]) -> "SamplingRows":
        """Of each row's choice and seed (of any size; 32 bits of it count)."""
        top_k = [s.top_k or np.iinfo(np.int32).max for s, _ in rows]
        return SamplingRows(
            np.array([s.temperature for s, _ in rows], np.float32),
            np.array([min(k, np.iinfo(np.int32).max) for k in top_k], np.int32),
            np.array([s.top_p for s, _ in rows], np.float32),
            np.array([s.min_p for s, _ in rows], np.float32),
            np.array([s.repetition_penalty for s, _ in rows], np.float32),
            np.array([seed % 2**32 for _, seed in rows], np.uint32),
        )


def sample(
    logits_VB: jax.Array, rows: SamplingRows, seen_BV: jax.Array, position_B: jax.Array
) -> jax.Array:
    """One token id a row, int32 (B,): a function of the row's logits, choice, seed and position,
    whatever the other rows are. seen_BV: tokens that a repetition penalty is for.

    The likeliest token always passes; of several with the same logit at an edge, all do.
    """

    def penalised(logits_VB):
        lowered_VB = jnp.where(logits_VB > 0, logits_VB / penalty_B, logits_VB * penalty_B)
        return jnp.where(seen_BV.T, lowered_VB, logits_VB)

    penalty_B = jnp.asarray(rows.penalty_B)
    logits_VB = lax.cond(jnp.any(penalty_B != 1), penalised, lambda x: x, logits_VB)
    greedy_B = jnp.argmax(logits_VB, axis=0).astype(jnp.int32)

    def draw(logits_VB):
        temperature_B = jnp.where(rows.temperature_B == 0, 1, rows.temperature_B)
        scaled_BV = (logits_VB / temperature_B).T
        cuts = (rows.top_k_B < len(logits_VB)) | (rows.top_p_B < 1) | (rows.min_p_B > 0)
        kept_BV = lax.cond(jnp.any(cuts), partial(_cut, rows=rows), lambda x: x, scaled_BV)
        # A key of the request's own: no other request changes what it draws.
        key_B = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(
            rows.seed_B, position_B
        )
        drawn_B = jax.vmap(jax.random.categorical)(key_B, kept_BV).astype(jnp.int32)
        return jnp.where(rows.temperature_B == 0, greedy_B, drawn_B)

    return lax.cond(jnp.any(rows.temperature_B > 0), draw, lambda _: greedy_B, logits_VB)


def _cut(logits_BV: jax.Array, rows: SamplingRows) -> jax.Array:
    """The logits, those that a row cuts off at -inf."""
    falling_BV = -jnp.sort(-logits_BV, axis=-1)
    V = logits_BV.shape[1]
    last_B1 = jnp.minimum(rows.top_k_B, V)[:, None] - 1
    least_B1 = jnp.take_along_axis(falling_BV, last_B1, axis=1)
    falling_BV = jnp.where(falling_BV >= least_B1, falling_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(falling_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    top_p_B1 = rows.top_p_B[:, None]
    # What came before may add up to 1 by rounding, before the last of them.
    within_BV = (before_BV < top_p_B1) | (top_p_B1 >= 1)
    within_BV &= falling_BV > -jnp.inf
    within_BV &= probability_BV >= rows.min_p_B[:, None] * probability_BV[:, :1]
    least_B1 = jnp.min(jnp.where(within_BV, falling_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
