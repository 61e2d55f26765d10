"""The two programs of generation: prefill of whole prompts, and decoding with a cache.

Their shapes are static: a row of the cache (a slot) for each request, prompts padded to a bucket,
as many cache entries as a bucket says, or as a layer's window. Nothing here knows of requests.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from olmo_jax.generate.sampling import SamplingRows, sample
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.rope import rope_tables
from olmo_jax.model.transformer import Transformer
from olmo_jax.ops.attention import AttentionMask, alibi_slopes
from olmo_jax.ops.attention_decode import Cache, ring

STEPS = 8  # most tokens a slot in one call of `decode`
TOP = 20  # alternatives that come with log-probabilities


class State(NamedTuple):
    """What stays on the devices between calls, and is changed in place."""

    cache: list[Cache]
    """Of each layer, (slots, K, S, C)."""
    seen_BV: jax.Array
    """Tokens that a slot's prompt and text have."""


class Chosen(NamedTuple):
    """Tokens, and where any request asked for them their log-probabilities (zeros if not): those of
    the model itself, before temperature, penalty and cuts."""

    token_B: Any
    logprob_B: Any
    top_BN: Any
    top_logprob_BN: Any


class Decoder(nnx.Module):
    """A model whose layers lie apart: a slice of a stack would be copied at every token."""

    def __init__(self, model: Transformer):
        self.embed, self.final_norm = model.embed, model.final_norm
        graph, stacked = nnx.split(model.layers)
        self.layers = nnx.List(
            nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked))
            for i in range(model.config.n_layers)
        )
        for layer in self.layers:
            # The form that any placement of the weights can run, as in training's samples.
            kernels = layer.attention.kernels
            layer.attention.kernels = replace(kernels, attention="blocked")
        self.head = nnx.Param(model.head_DV())
        self.config = model.config

    def __call__(self, tokens_BT, position_BT, cache: list[Cache] | None):
        """The final norm's output, and each layer's keys and values as its attention gives them."""
        config = self.config
        ropes = rope_tables(config, position_BT)
        slopes_H = alibi_slopes(config.n_heads) if config.position == "alibi" else None
        x_BTD = self.embed.weight[...][tokens_BT].astype(config.compute_dtype)
        offset = 0 if cache is None else position_BT[:, 0]
        out = []
        for i, (layer, window) in enumerate(zip(self.layers, config.windows, strict=True)):
            mask = AttentionMask(window, None, slopes_H, offset)
            x_BTD, kv, _ = layer(x_BTD, ropes.of(window), mask, cache and cache[i])
            out.append(kv)
        return self.final_norm(x_BTD), out

    def logits(self, x_BD):
        """float32 logits (B, V)."""
        head_DV = self.head[...].astype(x_BD.dtype)
        return jnp.dot(x_BD, head_DV, preferred_element_type=jnp.float32)


@jax.jit
def unstacked(model: Transformer) -> Decoder:
    """The model, ready for decoding."""
    return Decoder(model)


def choose(
    logits_BV, rows: SamplingRows, seen_BV, position_B, wants_logprobs
) -> tuple[Chosen, jax.Array]:
    """The tokens at position_B, and what is seen with them."""
    token_B = sample(logits_BV, rows, seen_BV, position_B)
    B, V = logits_BV.shape
    n = min(TOP, V)

    def logprobs(logits_BV):
        log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        top_logprob_BN, top_BN = lax.top_k(log_BV, n)
        return jnp.take_along_axis(log_BV, token_B[:, None], axis=1)[:, 0], top_BN, top_logprob_BN

    def none(_):
        return jnp.zeros(B), jnp.zeros((B, n), jnp.int32), jnp.zeros((B, n))

    out = Chosen(token_B, *lax.cond(wants_logprobs, logprobs, none, logits_BV))
    return out, seen_BV.at[jnp.arange(B), token_B].set(True)


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty(config: ModelConfig, slots: int, length: int) -> State:
    """Caches for `length` positions, or a window's where that is less."""

    def layer(window):
        size = min(window or length, length)
        zeros = jnp.zeros((slots, config.kv_heads, size, config.head_width), config.compute_dtype)
        return zeros, zeros

    return State([layer(w) for w in config.windows], jnp.zeros((slots, config.rows), jnp.bool_))


@partial(jax.jit, static_argnums=(0, 2))
def grown(config: ModelConfig, state: State, length: int) -> State:
    """With caches for more positions. A ring is whole before it turns, so entries keep places."""

    def layer(window, kv):
        more = min(window or length, length) - kv[0].shape[2]
        return tuple(jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0))) for a in kv)

    cache = [layer(w, kv) for w, kv in zip(config.windows, state.cache, strict=True)]
    return state._replace(cache=cache)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    graph, weights, state: State, tokens_RT, n_R, slot_R, rows: SamplingRows, wants_logprobs
) -> tuple[Chosen, State]:
    """Fills slots from prompts of n_R tokens, padded to T, and chooses each one's first token."""
    decoder = nnx.merge(graph, weights)
    R, T = tokens_RT.shape
    x_RTD, new = decoder(tokens_RT, jnp.arange(T)[None], None)

    def put(old_BKSC, new_RTKC):
        new_RKSC = ring(new_RTKC, n_R, old_BKSC.shape[2]).astype(old_BKSC.dtype)
        for r in range(R):
            at = (slot_R[r], 0, 0, 0)
            old_BKSC = lax.dynamic_update_slice(old_BKSC, new_RKSC[r : r + 1], at)
        return old_BKSC

    cache = [tuple(map(put, old, kv)) for old, kv in zip(state.cache, new, strict=True)]
    row_R = jnp.arange(R)
    V = state.seen_BV.shape[1]
    valid_RT = jnp.arange(T) < n_R[:, None]
    seen_RV = jnp.zeros((R, V), jnp.bool_)
    seen_RV = seen_RV.at[row_R[:, None], tokens_RT].max(valid_RT)
    logits_RV = decoder.logits(x_RTD[row_R, n_R - 1])
    chosen, seen_RV = choose(logits_RV, rows, seen_RV, n_R, wants_logprobs)
    return chosen, State(cache, state.seen_BV.at[slot_R].set(seen_RV))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    graph, weights, state: State, token_B, position_B, rows: SamplingRows, wants_logprobs, steps
) -> tuple[Chosen, State]:
    """The next `steps` (at most STEPS) tokens of every slot after token_B at position_B; each part
    of the result with a leading axis of STEPS."""
    decoder = nnx.merge(graph, weights)

    def one(i, carry):
        token_B, state, out = carry
        at_B = position_B + i
        x_B1D, cache = decoder(token_B[:, None], at_B[:, None], state.cache)
        logits_BV = decoder.logits(x_B1D[:, 0])
        chosen, seen_BV = choose(logits_BV, rows, state.seen_BV, at_B + 1, wants_logprobs)
        out = jax.tree.map(lambda all_, new: all_.at[i].set(new), out, chosen)
        return chosen.token_B, State(cache, seen_BV), out

    B, n = len(token_B), min(TOP, state.seen_BV.shape[1])
    token, number = jnp.int32, jnp.float32
    shapes = Chosen(((B,), token), ((B,), number), ((B, n), token), ((B, n), number))
    out = Chosen(*(jnp.zeros((STEPS, *shape), dtype) for shape, dtype in shapes))
    _, state, out = lax.fori_loop(0, steps, one, (token_B, state, out))
    return out, state
