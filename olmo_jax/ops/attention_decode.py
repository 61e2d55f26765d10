"""Attention of one new position a row over a key/value cache, each row at a position of its own.

A cache of S entries is a ring: position p lies at p mod S. One of a window's size is all that a
windowed layer ever looks at; one that no position exceeds is a plain array.
"""

import jax
import jax.numpy as jnp
from jax import lax

from olmo_jax.ops.attention_mask import NEVER, AttentionMask

Cache = tuple[jax.Array, jax.Array]
"""Keys and values of a layer, (B, K, S, C) each."""


def write(cache_BKSC: jax.Array, new_BKC: jax.Array, position_B: jax.Array) -> jax.Array:
    """The cache with one new key (or value) a row at its position."""
    S = cache_BKSC.shape[2]

    def row(old_KSC, new_KC, position):
        new_K1C = new_KC[:, None].astype(old_KSC.dtype)
        return lax.dynamic_update_slice(old_KSC, new_K1C, (0, position % S, 0))

    return jax.vmap(row)(cache_BKSC, new_BKC, position_B)


def attention_decode(
    q_BHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    position_B: jax.Array,
    mask: AttentionMask,
) -> jax.Array:
    """softmax(q k / sqrt(C)) v as (B, H, C), of queries at position_B, whose own keys are written.

    Of the mask, the window (at most S where the ring wraps) and ALiBi's slopes count.
    """
    B, H, C = q_BHC.shape
    K, S = k_BKSC.shape[1:3]
    q_BKGC = (q_BHC * C**-0.5).reshape(B, K, H // K, C)
    scores = jnp.einsum("bkgc,bksc->bkgs", q_BKGC, k_BKSC, preferred_element_type=jnp.float32)
    # How many positions ago an entry was written; before the row's first position, never.
    ago_BS = (position_B[:, None] - jnp.arange(S)) % S
    seen_BS = ago_BS <= position_B[:, None]
    if mask.window:
        seen_BS &= ago_BS < mask.window
    if mask.slopes_H is not None:
        slopes_KG1 = jnp.asarray(mask.slopes_H).reshape(K, H // K, 1)
        scores -= slopes_KG1 * ago_BS[:, None, None].astype(jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen_BS[:, None, None], scores, NEVER), axis=-1)
    out_BKGC = jnp.einsum("bkgs,bksc->bkgc", weights.astype(v_BKSC.dtype), v_BKSC)
    return out_BKGC.reshape(B, H, C)


def ring(new_RTKC: jax.Array, n_R: jax.Array, S: int) -> jax.Array:
    """Keys (or values) of whole prompts of n_R positions, padded to T, as the first entries of
    rings of S: (R, K, min(S, T), C). What lies there of the padding is seen by nobody: it is before
    the first position or overwritten before its own comes."""
    T = new_RTKC.shape[1]
    if T > S:  # the last S positions, each at its place
        last_R1 = n_R[:, None] - 1
        position_RS = last_R1 - (last_R1 - jnp.arange(S)) % S
        index = jnp.maximum(position_RS, 0)[..., None, None]
        new_RTKC = jnp.take_along_axis(new_RTKC, index, axis=1)
    return new_RTKC.swapaxes(1, 2)
