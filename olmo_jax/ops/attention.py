"""Scaled dot-product attention: causal, windowed, within documents, grouped-query, ALiBi.

A mask is data: `AttentionMask` says what may be seen, and each form turns it into what it needs.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_NEVER = -1e30  # not -inf: a difference of two would be NaN


@dataclass(frozen=True)
class AttentionMask:
    """Causal, and narrower where a field says so.

    window: keys that a query sees, counting itself; 0 is all that came before.
    segment_ids_BT: documents; a query sees keys of its own segment only. None is one document.
    offset: index among the keys of the first query (more than 0 when decoding with a cache).
    alibi: not what may be seen but how much it weighs: scores fall by a head's slope for each
    token between query and key (see `alibi_slopes`).
    """

    window: int = 0
    segment_ids_BT: jax.Array | None = None
    offset: jax.Array | int = 0
    alibi: bool = False


def alibi_slopes(n_heads: int) -> np.ndarray:
    """ALiBi's slope of each head, float32 (H,): 2^(-8 h / H) for h = 1 … H where H is a power of
    two, else every other one of the next power's first (Press et al. 2022, in MPT's order)."""
    power = 1 << (n_heads - 1).bit_length()
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    if power != n_heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes.astype(np.float32)


def attention(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask: AttentionMask, form: str
) -> jax.Array:
    """softmax(q k / sqrt(C)) v, as BTHC in v's type; scores and softmax in float32.

    H must be a multiple of K: query head h reads key head h // (H / K). T = S and mask.offset = 0.
    form is `Kernels.attention`.
    """
    # (B, H, T, C) layout: XLA:CPU runs P·V at about twice the rate of (B, T, H, C).
    k_BKSC, v_BKSC = k_BSKC.swapaxes(1, 2), v_BSKC.swapaxes(1, 2)
    if form == "reference":
        return attention_cached(q_BTHC, k_BKSC, v_BKSC, mask)
    B, T, H, C = q_BTHC.shape
    K = k_BKSC.shape[1]
    q_BKGTC = q_BTHC.swapaxes(1, 2).reshape(B, K, H // K, T, C)
    out_BKGTC = _blocked(q_BKGTC, k_BKSC, v_BKSC, mask.segment_ids_BT, mask.window, mask.alibi)
    return out_BKGTC.reshape(B, H, T, C).swapaxes(1, 2)


def attention_cached(
    q_BTHC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, mask: AttentionMask
) -> jax.Array:
    """The reference form; keys and values lie in the cache's layout, heads before positions."""
    B, T, H, C = q_BTHC.shape
    K, S = k_BKSC.shape[1:3]
    q_BKGTC = q_BTHC.swapaxes(1, 2).reshape(B, K, H // K, T, C)
    scores = _scores(q_BKGTC, k_BKSC, mask, slice(0, T), slice(0, S))
    weights = jax.nn.softmax(scores, axis=-1)
    out_BKGTC = jnp.einsum("bkgts,bksc->bkgtc", weights.astype(v_BKSC.dtype), v_BKSC)
    return out_BKGTC.reshape(B, H, T, C).swapaxes(1, 2)


def _allowed(mask: AttentionMask, q_T1, k_1S, rows: slice, keys: slice) -> jax.Array:
    """What the queries may see of the keys: (T, S) or, with segments, (B, 1, 1, T, S)."""
    allowed = k_1S <= q_T1
    if mask.window:
        allowed &= q_T1 - k_1S < mask.window
    if mask.segment_ids_BT is not None:
        ids = mask.segment_ids_BT
        same_BTS = ids[:, rows, None] == ids[:, None, keys]
        allowed = (allowed & same_BTS)[:, None, None]
    return allowed


def _scores(q_BKGTC, k_BKSC, mask: AttentionMask, rows: slice, keys: slice) -> jax.Array:
    """float32 scores, (B, K, G, T, S), of queries `rows` and keys `keys`, what is not allowed at
    `_NEVER`."""
    q_T1 = jnp.arange(rows.start, rows.stop)[:, None] + mask.offset
    k_1S = jnp.arange(keys.start, keys.stop)[None, :]
    q, k = q_BKGTC[..., rows, :] * q_BKGTC.shape[-1] ** -0.5, k_BKSC[:, :, keys]
    scores = jnp.einsum("bkgtc,bksc->bkgts", q, k, preferred_element_type=jnp.float32)
    if mask.alibi:
        K, G = q.shape[1:3]
        # Within a document positions and indices differ by a constant: no need of the former.
        scores += alibi_slopes(K * G).reshape(K, G, 1, 1) * (k_1S - q_T1).astype(jnp.float32)
    return jnp.where(_allowed(mask, q_T1, k_1S, rows, keys), scores, _NEVER)


# --- the blocked form ---------------------------------------------------------------------------
#
# Queries in at most 8 blocks, each against only the keys that it can see, so that the part above
# the diagonal (and outside a window) is neither computed nor stored; the backward pass makes the
# weights again instead of keeping (T, S) arrays for every layer, and takes the softmax's inner sum
# over C instead of S (FlashAttention, Dao et al. 2022).


def _blocks(T: int, window: int) -> list[tuple[slice, slice]]:
    """For each block of queries: its rows, and the keys that any of them may see."""
    size = max(128, -(-T // 8))
    out = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = max(0, start - window + 1) if window else 0
        out.append((slice(start, stop), slice(first, stop)))
    return out


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocked(q_BKGTC, k_BKSC, v_BKSC, segment_ids_BT, window: int, alibi: bool):
    return _blocked_forward(q_BKGTC, k_BKSC, v_BKSC, segment_ids_BT, window, alibi)[0]


def _blocked_forward(q_BKGTC, k_BKSC, v_BKSC, segment_ids_BT, window, alibi):
    mask = AttentionMask(window, segment_ids_BT, alibi=alibi)
    outs, log_sums = [], []
    for rows, keys in _blocks(q_BKGTC.shape[3], window):
        scores = _scores(q_BKGTC, k_BKSC, mask, rows, keys)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        v = v_BKSC[:, :, keys]
        out = jnp.einsum("bkgts,bksc->bkgtc", weights.astype(v.dtype), v)
        outs.append((out / total).astype(v.dtype))
        log_sums.append(largest + jnp.log(total))
    out_BKGTC = jnp.concatenate(outs, axis=3)
    log_sum_BKGT1 = jnp.concatenate(log_sums, axis=3)
    return out_BKGTC, (q_BKGTC, k_BKSC, v_BKSC, segment_ids_BT, out_BKGTC, log_sum_BKGT1)


def _blocked_backward(window, alibi, saved, d_out_BKGTC):
    q_BKGTC, k_BKSC, v_BKSC, segment_ids_BT, out_BKGTC, log_sum_BKGT1 = saved
    mask = AttentionMask(window, segment_ids_BT, alibi=alibi)
    dtype, f32 = v_BKSC.dtype, jnp.float32
    inner_BKGT1 = jnp.sum(d_out_BKGTC.astype(f32) * out_BKGTC.astype(f32), axis=-1, keepdims=True)
    dqs = []
    # Gradients of keys and values are added up as (C, S): XLA:CPU makes that product at 105
    # GFLOP/s where it makes (S, C) at 66.
    dk_BKCS = jnp.zeros(k_BKSC.swapaxes(2, 3).shape, f32)
    dv_BKCS = jnp.zeros_like(dk_BKCS)
    scale = q_BKGTC.shape[-1] ** -0.5
    for rows, keys in _blocks(q_BKGTC.shape[3], window):
        scores = _scores(q_BKGTC, k_BKSC, mask, rows, keys)
        weights = jnp.exp(scores - log_sum_BKGT1[..., rows, :])
        d_out = d_out_BKGTC[..., rows, :]
        d_weights = jnp.einsum(
            "bkgtc,bksc->bkgts", d_out, v_BKSC[:, :, keys], preferred_element_type=f32
        )
        d_scores = (weights * (d_weights - inner_BKGT1[..., rows, :]) * scale).astype(dtype)
        dqs.append(jnp.einsum("bkgts,bksc->bkgtc", d_scores, k_BKSC[:, :, keys]))
        dk = jnp.einsum(
            "bkgts,bkgtc->bkcs", d_scores, q_BKGTC[..., rows, :], preferred_element_type=f32
        )
        dv = jnp.einsum(
            "bkgts,bkgtc->bkcs", weights.astype(dtype), d_out, preferred_element_type=f32
        )
        dk_BKCS, dv_BKCS = dk_BKCS.at[..., keys].add(dk), dv_BKCS.at[..., keys].add(dv)
    dq_BKGTC = jnp.concatenate(dqs, axis=3)
    dk_BKSC, dv_BKSC = dk_BKCS.swapaxes(2, 3), dv_BKCS.swapaxes(2, 3)
    return dq_BKGTC.astype(dtype), dk_BKSC.astype(dtype), dv_BKSC.astype(dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)
