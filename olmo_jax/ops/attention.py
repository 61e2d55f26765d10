"""Scaled dot-product attention: causal, windowed, within documents, grouped-query.

A mask is data: `AttentionMask` says what may be seen, and each form turns it into what it needs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class AttentionMask:
    """Causal, and narrower where a field says so.

    window: keys that a query sees, counting itself; 0 is all that came before.
    segment_ids_BT: documents; a query sees keys of its own segment only. None is one document.
    offset: index among the keys of the first query (more than 0 when decoding with a cache).
    """

    window: int = 0
    segment_ids_BT: jax.Array | None = None
    offset: jax.Array | int = 0

    def allowed(self, n_queries: int, n_keys: int) -> jax.Array:
        """What each query may see, boolean, (T, S) or, with segments, (B, 1, 1, T, S)."""
        q_T1 = jnp.arange(n_queries)[:, None] + self.offset
        k_1S = jnp.arange(n_keys)[None, :]
        allowed = k_1S <= q_T1
        if self.window:
            allowed &= q_T1 - k_1S < self.window
        if self.segment_ids_BT is not None:
            ids = self.segment_ids_BT
            same_BTS = ids[:, :, None] == ids[:, None, :]
            allowed = (allowed & same_BTS)[:, None, None]
        return allowed


def attention(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask: AttentionMask
) -> jax.Array:
    """softmax(q k / sqrt(C)) v, as BTHC in v's type; scores and softmax in float32.

    H must be a multiple of K: query head h reads key head h // (H / K).
    """
    # (B, H, T, C) layout: XLA:CPU runs P·V at about twice the rate of (B, T, H, C).
    k_BKSC, v_BKSC = k_BSKC.swapaxes(1, 2), v_BSKC.swapaxes(1, 2)
    return attention_cached(q_BTHC, k_BKSC, v_BKSC, mask)


def attention_cached(
    q_BTHC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, mask: AttentionMask
) -> jax.Array:
    """`attention` for keys and values that lie in the cache's layout, heads before positions."""
    B, T, H, C = q_BTHC.shape
    K, S = k_BKSC.shape[1:3]
    q_BKGTC = q_BTHC.swapaxes(1, 2).reshape(B, K, H // K, T, C)
    scores_BKGTS = jnp.einsum(
        "bkgtc,bksc->bkgts", q_BKGTC * C**-0.5, k_BKSC, preferred_element_type=jnp.float32
    )
    allowed = mask.allowed(T, S)
    weights_BKGTS = jax.nn.softmax(jnp.where(allowed, scores_BKGTS, -1e30), axis=-1)
    out_BKGTC = jnp.einsum("bkgts,bksc->bkgtc", weights_BKGTS.astype(v_BKSC.dtype), v_BKSC)
    return out_BKGTC.reshape(B, H, T, C).swapaxes(1, 2)
