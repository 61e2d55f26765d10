"""Scaled dot-product attention: causal, windowed, within documents, grouped-query, ALiBi.

A mask is data: `AttentionMask` says what may be seen, and each form turns it into what it needs.
A form is a pair of functions on one device's arrays, forward and backward; on a mesh they run
inside `jax.shard_map` (attention_context.py: sequences that are cut over devices).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from olmo_jax.ops.attention_context import attention_in_parts
from olmo_jax.ops.attention_form import fused
from olmo_jax.ops.attention_mask import AttentionMask, alibi_slopes, scores
from olmo_jax.ops.kernels import Kernels
from olmo_jax.parallel.mesh import current_mesh
from olmo_jax.parallel.sharding import cuts

__all__ = ["AttentionMask", "alibi_slopes", "attention"]


def attention(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask: AttentionMask, kernels: Kernels
) -> jax.Array:
    """softmax(q k / sqrt(C)) v, as BTHC in v's type; scores and softmax in float32.

    H must be a multiple of K: query head h reads key head h // (H / K). T = S and mask.offset = 0.
    On a mesh, rows are cut over the batch axes, heads over `tensor`, and positions over `context`,
    in zigzag order.
    """
    mesh = current_mesh()
    if mesh is None:
        return _on_one_device(q_BTHC, k_BSKC, v_BSKC, mask, kernels)
    tensor, K = mesh.shape["tensor"], k_BSKC.shape[2]
    rows, time, heads, _ = cuts(mesh, ("batch", "time", "heads", None), q_BTHC.shape)
    assert not time or mask.last_reader_BT is None  # a tree's row is whole on a device
    # Fewer key heads than devices are whole on each, which takes the one that its queries need.
    few = bool(heads) and K % tensor != 0
    assert not few or tensor % K == 0, (tensor, K)  # refused at the start
    q_spec, k_spec = P(rows, time, heads, None), P(rows, time, () if few else heads, None)
    mask_specs = AttentionMask(
        mask.window,
        None if mask.segment_ids_BT is None else P(rows, time),  # type: ignore[arg-type]
        None if mask.slopes_H is None else P(heads),  # type: ignore[arg-type]
        last_reader_BT=None if mask.last_reader_BT is None else P(rows),  # type: ignore[arg-type]
        positions_BT=None if mask.positions_BT is None else P(rows),  # type: ignore[arg-type]
    )

    @partial(
        jax.shard_map,
        in_specs=(q_spec, k_spec, k_spec, mask_specs),
        out_specs=q_spec,
        check_vma=False,
    )
    def on_each_device(q_BTHC, k_BSKC, v_BSKC, mask):
        if few:
            head = lax.axis_index("tensor") * K // tensor
            k_BSKC, v_BSKC = (
                lax.dynamic_slice_in_dim(a, head, 1, axis=2) for a in (k_BSKC, v_BSKC)
            )
        if time:
            return attention_in_parts(q_BTHC, k_BSKC, v_BSKC, mask, kernels)
        return _on_one_device(q_BTHC, k_BSKC, v_BSKC, mask, kernels)

    return on_each_device(q_BTHC, k_BSKC, v_BSKC, mask)


def _on_one_device(q_BTHC, k_BSKC, v_BSKC, mask: AttentionMask, kernels: Kernels):
    if kernels.attention == "reference":
        k_BKSC, v_BKSC = k_BSKC.swapaxes(1, 2), v_BSKC.swapaxes(1, 2)
        return _reference(q_BTHC, k_BKSC, v_BKSC, mask)
    return fused(q_BTHC, k_BSKC, v_BSKC, mask, kernels)


def _reference(q_BTHC, k_BKSC, v_BKSC, mask: AttentionMask) -> jax.Array:
    B, T, H, C = q_BTHC.shape
    K, S = k_BKSC.shape[1:3]
    q_BKGTC = q_BTHC.swapaxes(1, 2).reshape(B, K, H // K, T, C)
    weights = jax.nn.softmax(scores(q_BKGTC, k_BKSC, mask, slice(0, T), slice(0, S)), axis=-1)
    out_BKGTC = jnp.einsum("bkgts,bksc->bkgtc", weights.astype(v_BKSC.dtype), v_BKSC)
    return out_BKGTC.reshape(B, H, T, C).swapaxes(1, 2)
