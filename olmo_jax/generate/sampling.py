"""From logits to a token: greedy, temperature, top-k, top-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from olmo_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the likeliest; top_k None and top_p 1 cut
    nothing off."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"temperature = {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: it must be above 0 and at most 1")


def sample(logits_V: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id, an int32 scalar. Of several cuts the tokens that pass all are kept; the
    likeliest always is. top_p keeps the fewest likeliest tokens whose probabilities reach it
    (nucleus sampling, Holtzman et al. 2020), after the temperature.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    logits_V = logits_V / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_V.shape[0]:
        least = jax.lax.top_k(logits_V, sampling.top_k)[0][-1]
        logits_V = jnp.where(logits_V >= least, logits_V, -jnp.inf)
    if sampling.top_p < 1:
        falling_V = jnp.sort(logits_V)[::-1]
        before_V = jnp.cumsum(jax.nn.softmax(falling_V)) - jax.nn.softmax(falling_V)
        least = jnp.min(jnp.where(before_V < sampling.top_p, falling_V, jnp.inf))
        logits_V = jnp.where(logits_V >= least, logits_V, -jnp.inf)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)
