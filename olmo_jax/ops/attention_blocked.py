"""The blocked form of attention: CPU's, and any platform's where no fused kernel fits.

Queries in at most 8 blocks, each against only the keys that it can see, so that the part above the
diagonal (and outside a window) is neither computed nor stored; the backward pass makes the weights
again instead of keeping (T, S) arrays for every layer, and takes the softmax's inner sum over C
instead of S (FlashAttention, Dao et al. 2022).
"""

import jax
import jax.numpy as jnp

from olmo_jax.ops.attention_mask import AttentionMask, scores


def _blocks(T: int, S: int, mask: AttentionMask) -> list[tuple[slice, slice]]:
    """For each block of queries: its rows, and the keys that any of them may see."""
    size = max(128, -(-T // 8))
    out = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        if not mask.causal:
            out.append((slice(start, stop), slice(0, S)))
            continue
        # In a tree what is near by position may be far by index.
        windowed = mask.window and mask.positions_BT is None
        first = max(0, start + mask.offset - mask.window + 1) if windowed else 0
        out.append((slice(start, stop), slice(first, min(S, stop + mask.offset))))
    return out


def _heads_first(q_BTHC, k_BSKC):
    """(B, K, G, T, C) and (B, K, S, C): XLA:CPU runs P·V at about twice the rate of positions
    first."""
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    return q_BTHC.swapaxes(1, 2).reshape(B, K, H // K, T, C), k_BSKC.swapaxes(1, 2)


def _heads_last(a_BKGTC):
    B, K, G, T, C = a_BKGTC.shape
    return a_BKGTC.reshape(B, K * G, T, C).swapaxes(1, 2)


def forward(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, jax.Array]:
    """The output (B, T, H, C) in v's type, and float32 log(sum(exp(scores))), (B, T, H)."""
    q_BKGTC, k_BKSC = _heads_first(q_BTHC, k_BSKC)
    v_BKSC = v_BSKC.swapaxes(1, 2)
    outs, log_sums = [], []
    for rows, keys in _blocks(q_BTHC.shape[1], k_BSKC.shape[1], mask):
        scores_ = scores(q_BKGTC, k_BKSC, mask, rows, keys)
        largest = jnp.max(scores_, axis=-1, keepdims=True)
        weights = jnp.exp(scores_ - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        v = v_BKSC[:, :, keys]
        out = jnp.einsum("bkgts,bksc->bkgtc", weights.astype(v.dtype), v)
        outs.append((out / total).astype(v.dtype))
        log_sums.append(largest + jnp.log(total))
    log_sum_BTH1 = _heads_last(jnp.concatenate(log_sums, axis=3))
    return _heads_last(jnp.concatenate(outs, axis=3)), log_sum_BTH1[..., 0]


def backward(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask: AttentionMask,
    out_BTHC: jax.Array,
    log_sum_BTH: jax.Array,
    d_out_BTHC: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, in their types.

    The output and its log-sum may be over more keys than these: then they are these keys' part.
    """
    dtype, f32 = v_BSKC.dtype, jnp.float32
    q_BKGTC, k_BKSC = _heads_first(q_BTHC, k_BSKC)
    d_out_BKGTC, v_BKSC = _heads_first(d_out_BTHC, v_BSKC)
    inner_BTH1 = jnp.sum(d_out_BTHC.astype(f32) * out_BTHC.astype(f32), axis=-1, keepdims=True)
    inner_BKGT1, _ = _heads_first(inner_BTH1, k_BSKC)
    log_sum_BKGT1, _ = _heads_first(log_sum_BTH[..., None], k_BSKC)
    dqs = []
    # Gradients of keys and values are added up as (C, S): XLA:CPU makes that product at 105
    # GFLOP/s where it makes (S, C) at 66.
    dk_BKCS = jnp.zeros(k_BKSC.swapaxes(2, 3).shape, f32)
    dv_BKCS = jnp.zeros_like(dk_BKCS)
    scale = q_BTHC.shape[-1] ** -0.5
    for rows, keys in _blocks(q_BTHC.shape[1], k_BSKC.shape[1], mask):
        scores_ = scores(q_BKGTC, k_BKSC, mask, rows, keys)
        weights = jnp.exp(scores_ - log_sum_BKGT1[..., rows, :])
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
    dq_BTHC = _heads_last(jnp.concatenate(dqs, axis=3))
    dk_BSKC, dv_BSKC = (a.transpose(0, 3, 1, 2) for a in (dk_BKCS, dv_BKCS))
    return dq_BTHC.astype(q_BTHC.dtype), dk_BSKC.astype(dtype), dv_BSKC.astype(dtype)
