"""The two programs of generation: prefill of whole prompts, and decoding with a cache.

Their shapes are static: a row of the cache (a slot) for each request, prompts padded to a bucket,
as many cache entries as a bucket says, or as a layer's window. Nothing here knows of requests.
"""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from olmo_jax.generate.sampling import SamplingRows, sample
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.layers import Linear
from olmo_jax.model.rope import rope_tables
from olmo_jax.model.transformer import Transformer
from olmo_jax.ops import int8
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


class Projection(nnx.Module):
    """y = x W + b with W stored (out, in), in the compute type or in int8 with a scale for each
    output; `rows_last` is CPU's form."""

    def __init__(self, weight_IO, bias, dtype, rows_last: bool, in_int8: bool):
        weight_OI = weight_IO.T
        weight_OI, scale_O = (
            int8.quantize(weight_OI) if in_int8 else (weight_OI.astype(dtype), None)
        )
        self.weight = nnx.Param(weight_OI)
        self.scale = None if scale_O is None else nnx.Param(scale_O)
        self.bias = None if bias is None else nnx.Param(bias.astype(dtype))
        self.rows_last = rows_last

    def product(self, x_NI, dtype):
        """W x^T, (out, N)."""
        w_OI = self.weight[...]
        if self.scale is None:
            return product(w_OI, x_NI, self.rows_last, dtype)
        return int8.product(w_OI, self.scale[...], x_NI, self.rows_last).astype(dtype)

    def __call__(self, *parts, make=None):
        x = make(*parts) if make else parts[0]
        y = self.product(x.reshape(-1, x.shape[-1]), x.dtype).T
        if self.bias is not None:
            y = y + self.bias[...]
        return y.reshape(*x.shape[:-1], -1)


def product(w_OI, x_NI, rows_last: bool, dtype):
    """W x^T, (out, N), in `dtype`.

    XLA:CPU multiplies W (out, in) with columns at memory speed, but x (2 to 16 rows, in) with W
    (in, out) by a slow path: 7.5 against 20 ms of processor time for 16 rows and 33 MB of weights.
    The barriers keep it from folding the turns of the small operands into the product: 28 ms.
    """
    if not rows_last:
        return jnp.einsum("oi,ni->on", w_OI, x_NI, preferred_element_type=dtype)
    x_IN = lax.optimization_barrier(x_NI.T)
    return lax.optimization_barrier(jnp.dot(w_OI, x_IN, preferred_element_type=dtype))


class Decoder(nnx.Module):
    """A model whose layers lie apart: a slice of a stack would be copied at every token."""

    def __init__(self, model: Transformer, in_int8: bool = False):
        self.embed, self.final_norm = model.embed, model.final_norm
        graph, stacked = nnx.split(model.layers)
        self.layers = nnx.List(
            nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked))
            for i in range(model.config.n_layers)
        )
        dtype, rows_last = model.config.compute_dtype, model.kernels.linear == "flat"
        for layer in self.layers:
            # The form that any placement of the weights can run, as in training's samples.
            kernels = layer.attention.kernels
            layer.attention.kernels = replace(kernels, attention="blocked")
            for part in (layer.attention, layer.mlp):
                for name, module in list(vars(part).items()):
                    if isinstance(module, Linear):
                        bias = None if module.bias is None else module.bias[...]
                        weight_IO = module.weight[...]
                        projection = Projection(weight_IO, bias, dtype, rows_last, in_int8)
                        setattr(part, name, projection)
        # A tied head is the embedding itself, which lies as it should.
        tied = model.lm_head is None
        self.head = None if tied else Projection(model.head_DV(), None, dtype, rows_last, in_int8)
        self.config, self.rows_last = model.config, rows_last

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
        """float32 logits, (V, B): to turn them costs as much as half the head's product."""
        if self.head is not None:
            return self.head.product(x_BD, jnp.float32)
        w_VD = self.embed.weight[...].astype(x_BD.dtype)
        return product(w_VD, x_BD, self.rows_last, jnp.float32)


@partial(jax.jit, static_argnums=1)
def unstacked(model: Transformer, in_int8: bool = False) -> Decoder:
    """The model, ready for decoding; in_int8: its projections and an untied head in int8, all else
    (experts, embedding, norms) as it is."""
    return Decoder(model, in_int8)


class Structure:
    """What of a decoder is no weight. Hashed by identity: a GraphDef's own hash took 5 ms, at each
    call of a program."""

    def __init__(self, graph: nnx.GraphDef):
        self.graph = graph


structure = lru_cache(maxsize=16)(Structure)  # one for all decoders that are alike


def choose(
    logits_VB, rows: SamplingRows, seen_BV, position_B, wants_logprobs
) -> tuple[Chosen, jax.Array]:
    """The tokens at position_B, and what is seen with them."""
    token_B = sample(logits_VB, rows, seen_BV, position_B)
    V, B = logits_VB.shape
    n = min(TOP, V)

    def logprobs(logits_VB):
        log_BV = jax.nn.log_softmax(logits_VB.T, axis=-1)
        top_logprob_BN, top_BN = lax.top_k(log_BV, n)
        return jnp.take_along_axis(log_BV, token_B[:, None], axis=1)[:, 0], top_BN, top_logprob_BN

    def none(_):
        return jnp.zeros(B), jnp.zeros((B, n), jnp.int32), jnp.zeros((B, n))

    out = Chosen(token_B, *lax.cond(wants_logprobs, logprobs, none, logits_VB))
    return out, seen_BV.at[jnp.arange(B), token_B].set(True)


@partial(jax.jit, static_argnums=(0, 2, 3))
def empty(config: ModelConfig, weights, slots: int, length: int) -> State:
    """Caches for `length` positions, or a window's where that is less."""
    some = jax.tree.leaves(weights)[0].reshape(-1)[0]
    nothing = jnp.where(some == some, 0, 0)  # made of the weights to lie on all their devices

    def layer(window):
        size = min(window or length, length)
        shape = slots, config.kv_heads, size, config.head_width
        zeros = jnp.broadcast_to(nothing.astype(config.compute_dtype), shape)
        return zeros, zeros

    seen_BV = jnp.broadcast_to(nothing != 0, (slots, config.rows))
    return State([layer(w) for w in config.windows], seen_BV)


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
    structure: Structure, weights, state: State, tokens_RT, n_R, slot_R
) -> tuple[jax.Array, State]:
    """Fills slots from prompts of n_R tokens, padded to T; the logits (V, R) after each."""
    decoder = nnx.merge(structure.graph, weights)
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
    seen_RV = jnp.zeros((R, state.seen_BV.shape[1]), jnp.bool_)
    seen_RV = seen_RV.at[row_R[:, None], tokens_RT].max(jnp.arange(T) < n_R[:, None])
    logits_VR = decoder.logits(x_RTD[row_R, n_R - 1])
    return logits_VR, State(cache, state.seen_BV.at[slot_R].set(seen_RV))


@partial(jax.jit, donate_argnums=0)
def first(
    seen_BV, logits_VR, rows: SamplingRows, slot_R, position_R, wants_logprobs
) -> tuple[Chosen, jax.Array]:
    """The tokens that follow prompts: apart from `prefill`, so that it is compiled once and not for
    each length of prompts."""
    chosen, seen_RV = choose(logits_VR, rows, seen_BV[slot_R], position_R, wants_logprobs)
    return chosen, seen_BV.at[slot_R].set(seen_RV)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    structure: Structure,
    weights,
    state: State,
    token_B,
    position_B,
    rows: SamplingRows,
    wants_logprobs,
    steps,
) -> tuple[Chosen, State]:
    """The next `steps` (at most STEPS) tokens of every slot after token_B at position_B; each part
    of the result with a leading axis of STEPS."""
    decoder = nnx.merge(structure.graph, weights)

    def one(i, carry):
        token_B, state, out = carry
        at_B = position_B + i
        x_B1D, cache = decoder(token_B[:, None], at_B[:, None], state.cache)
        logits_VB = decoder.logits(x_B1D[:, 0])
        chosen, seen_BV = choose(logits_VB, rows, state.seen_BV, at_B + 1, wants_logprobs)
        out = jax.tree.map(lambda all_, new: all_.at[i].set(new), out, chosen)
        return chosen.token_B, State(cache, seen_BV), out

    B, n = len(token_B), min(TOP, state.seen_BV.shape[1])
    token, number = jnp.int32, jnp.float32
    shapes = Chosen(((B,), token), ((B,), number), ((B, n), token), ((B, n), number))
    out = Chosen(*(jnp.zeros((STEPS, *shape), dtype) for shape, dtype in shapes))
    _, state, out = lax.fori_loop(0, steps, one, (token_B, state, out))
    return out, state
