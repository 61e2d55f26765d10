"""Attention inside `shard_map` where each sequence is cut over the mesh axis `context`.

With n devices along it, device i holds the chunks i and 2n - 1 - i of 2n (`sharding.zigzag`), so
that under a causal mask all see equally much. Every call of a form has a static mask.

gathered: keys and values of all devices on each (Llama 3, section 3.3.2). ring: they pass from one
device to the next, and partial outputs are merged by their log-sums (Ring Attention, Liu et al.
2023; zigzag after Brandon et al. 2023). halo: a window exchanges only what it reaches.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from olmo_jax.ops.attention_form import form_of, fused, named
from olmo_jax.ops.attention_mask import AttentionMask
from olmo_jax.ops.kernels import Kernels

AXIS = "context"


def attention_in_parts(
    q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, mask: AttentionMask, kernels: Kernels
) -> jax.Array:
    """This device's part of the output; T is its two chunks. mask.segment_ids_BT: its tokens'."""
    T, n = q_BTHC.shape[1], lax.axis_size(AXIS)
    if mask.window >= n * T:
        mask = AttentionMask(0, mask.segment_ids_BT, mask.slopes_H)
    if 1 < mask.window <= T // 2 + 1 and mask.slopes_H is None:
        return _halo(q_BTHC, k_BTKC, v_BTKC, mask, kernels)
    # A ring's blocks are as far apart as the device's number says: a window or ALiBi would not be
    # static there.
    if kernels.context == "ring" and not mask.window and mask.slopes_H is None:
        return _ring(q_BTHC, k_BTKC, v_BTKC, mask.segment_ids_BT, kernels)
    return _gathered(q_BTHC, k_BTKC, v_BTKC, mask, kernels)


def _halves(a):
    return jnp.split(a, 2, axis=1)


def _join(early, late):
    return jnp.concatenate([early, late], axis=1)


# --- gathered -------------------------------------------------------------------------------------


def _whole(a_BT):
    """All devices' parts of an array (B, T, …), in the order of the sequence."""
    B, T, *rest = a_BT.shape
    a = lax.all_gather(a_BT, AXIS, axis=1).reshape(B, -1, 2, T // 2, *rest)
    return _join(a[:, :, 0], a[:, ::-1, 1]).reshape(B, -1, *rest)


def _added_parts(a_BS, T: int):
    """This device's part of the sum over devices; the transpose of `_whole`."""
    B, _, *rest = a_BS.shape
    early, late = _halves(a_BS.reshape(B, -1, T // 2, *rest))
    a = jnp.stack([early, late[:, ::-1]], axis=2).reshape(B, -1, T, *rest)
    return lax.psum_scatter(a, AXIS, scatter_dimension=1)


def _chunks(i: int, n: int, mask: AttentionMask, T: int, ids_BS):
    """Device i's two chunks: their rows, the keys that they may see, and the mask between."""
    c = T // 2
    for half, chunk in enumerate((i, 2 * n - 1 - i)):
        rows = slice(half * c, (half + 1) * c)
        first = max(0, chunk * c - mask.window + 1) if mask.window else 0
        keys = slice(first, (chunk + 1) * c)
        ids = mask.segment_ids_BT
        yield (
            rows,
            keys,
            AttentionMask(
                mask.window,
                None if ids is None else ids[:, rows],
                mask.slopes_H,
                offset=chunk * c - first,
                key_segment_ids_BS=None if ids is None else ids_BS[:, keys],
            ),
        )


def _gather_for(mask: AttentionMask, k, v):
    ids = mask.segment_ids_BT
    return _whole(k), _whole(v), None if ids is None else _whole(ids)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gathered(q_BTHC, k_BTKC, v_BTKC, mask: AttentionMask, kernels: Kernels):
    return _gathered_forward(q_BTHC, k_BTKC, v_BTKC, mask, kernels)[0]


def _gathered_forward(q_BTHC, k_BTKC, v_BTKC, mask, kernels):
    T, n, form = q_BTHC.shape[1], lax.axis_size(AXIS), form_of(kernels)

    def on_device(i, q, k, v, ids_BS, mask):
        parts = [
            form.forward(q[:, rows], k[:, keys], v[:, keys], part)
            for rows, keys, part in _chunks(i, n, mask, T, ids_BS)
        ]
        return tuple(_join(*pair) for pair in zip(*parts, strict=True))

    branches = [partial(on_device, i) for i in range(n)]
    inputs = q_BTHC, *_gather_for(mask, k_BTKC, v_BTKC), mask
    out, log_sum = named(*lax.switch(lax.axis_index(AXIS), branches, *inputs))
    return out, (q_BTHC, k_BTKC, v_BTKC, mask, out, log_sum)


def _gathered_backward(kernels, saved, d_out_BTHC):
    q_BTHC, k_BTKC, v_BTKC, mask, out, log_sum = saved
    T, n, form = q_BTHC.shape[1], lax.axis_size(AXIS), form_of(kernels)

    def on_device(i, q, k, v, ids_BS, mask, *rest):
        dqs, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for rows, keys, part in _chunks(i, n, mask, T, ids_BS):
            dq, dk_part, dv_part = form.backward(
                q[:, rows], k[:, keys], v[:, keys], part, *(a[:, rows] for a in rest)
            )
            dqs.append(dq)
            dk, dv = dk.at[:, keys].add(dk_part), dv.at[:, keys].add(dv_part)
        return _join(*dqs), dk, dv

    branches = [partial(on_device, i) for i in range(n)]
    # Gathered again, rather than kept: a sequence's keys and values in each layer are what
    # cutting it was to save.
    inputs = q_BTHC, *_gather_for(mask, k_BTKC, v_BTKC), mask, out, log_sum, d_out_BTHC
    dq, dk, dv = lax.switch(lax.axis_index(AXIS), branches, *inputs)
    dk, dv = (_added_parts(a, T).astype(b.dtype) for a, b in ((dk, k_BTKC), (dv, v_BTKC)))
    return dq, dk, dv, None


_gathered.defvjp(_gathered_forward, _gathered_backward)


# --- ring -----------------------------------------------------------------------------------------
#
# Device i first attends to its own keys, then at step s to those of j = i - s (mod n). Its late
# queries see all of j's early keys. Beyond that, where j < i its early queries see j's early keys,
# and where j > i its late queries see j's late keys: two products of a chunk with a chunk, without
# a mask, on every device at every step.


def _next(tree):
    n = lax.axis_size(AXIS)
    return jax.tree.map(lambda a: lax.ppermute(a, AXIS, [(i, (i + 1) % n) for i in range(n)]), tree)


def _second_block(step, early_late_queries, early_late_keys):
    """The second block's queries and keys, and whether they are the early ones."""
    early = lax.axis_index(AXIS) >= step  # j < i
    queries = [jnp.where(early, *_halves(a)) for a in early_late_queries]
    keys = [None if a is None else jnp.where(early, *_halves(a)) for a in early_late_keys]
    return early, queries, keys


def _merged(out, log_sum, more_out, more_log_sum):
    """Two outputs over different keys as one over all of them; out is float32."""
    total = jnp.logaddexp(log_sum, more_log_sum)
    share, more = (jnp.exp(a - total)[..., None] for a in (log_sum, more_log_sum))
    return out * share + more_out.astype(jnp.float32) * more, total


def _unmasked(query_ids, key_ids):
    return AttentionMask(0, query_ids, key_segment_ids_BS=key_ids, causal=False)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q_BTHC, k_BTKC, v_BTKC, ids_BT, kernels: Kernels):
    return _ring_forward(q_BTHC, k_BTKC, v_BTKC, ids_BT, kernels)[0]


def _ring_forward(q_BTHC, k_BTKC, v_BTKC, ids_BT, kernels):
    form, n = form_of(kernels), lax.axis_size(AXIS)
    ids = ids_BT if ids_BT is not None else jnp.ones(q_BTHC.shape[:2], jnp.int32)
    travelling = _next((k_BTKC, v_BTKC, ids))
    out, log_sum = form.forward(q_BTHC, k_BTKC, v_BTKC, AttentionMask(0, ids_BT))
    (out_early, out_late), (sum_early, sum_late) = (
        _halves(out.astype(jnp.float32)),
        _halves(log_sum),
    )
    q_late, ids_late = _halves(q_BTHC)[1], _halves(ids)[1]
    for step in range(1, n):
        k, v, key_ids = travelling
        if step < n - 1:  # sent while this step computes
            travelling = _next(travelling)
        first = form.forward(
            q_late, _halves(k)[0], _halves(v)[0], _unmasked(ids_late, _halves(key_ids)[0])
        )
        out_late, sum_late = _merged(out_late, sum_late, *first)
        early, (q, q_ids), (k, v, key_ids) = _second_block(step, (q_BTHC, ids), (k, v, key_ids))
        second = form.forward(q, k, v, _unmasked(q_ids, key_ids))
        merged_early = _merged(out_early, sum_early, *second)
        merged_late = _merged(out_late, sum_late, *second)
        out_early, sum_early = (
            jnp.where(early, a, b)
            for a, b in zip(merged_early, (out_early, sum_early), strict=True)
        )
        out_late, sum_late = (
            jnp.where(early, b, a) for a, b in zip(merged_late, (out_late, sum_late), strict=True)
        )
    out, log_sum = named(_join(out_early, out_late).astype(out.dtype), _join(sum_early, sum_late))
    return out, (q_BTHC, k_BTKC, v_BTKC, ids_BT, out, log_sum)


def _ring_backward(kernels, saved, d_out_BTHC):
    q_BTHC, k_BTKC, v_BTKC, ids_BT, out, log_sum = saved
    form, n, f32 = form_of(kernels), lax.axis_size(AXIS), jnp.float32
    ids = ids_BT if ids_BT is not None else jnp.ones(q_BTHC.shape[:2], jnp.int32)
    travelling = _next((k_BTKC, v_BTKC, ids))
    local = form.backward(
        q_BTHC, k_BTKC, v_BTKC, AttentionMask(0, ids_BT), out, log_sum, d_out_BTHC
    )
    dq, dk, dv = (a.astype(f32) for a in local)
    dq_early, dq_late = _halves(dq)
    late = [_halves(a)[1] for a in (q_BTHC, ids, out, log_sum, d_out_BTHC)]
    for step in range(1, n):
        k, v, key_ids = travelling
        if step < n - 1:
            travelling = _next(travelling)
        dk, dv = _next((dk, dv))  # what the devices before found travels with the keys
        q, q_ids, *rest = late
        dq_first, *d_first = form.backward(
            q,
            _halves(k)[0],
            _halves(v)[0],
            _unmasked(q_ids, _halves(key_ids)[0]),
            *rest,
        )
        dq_late += dq_first
        early, (q, q_ids, *rest), (k, v, key_ids) = _second_block(
            step, (q_BTHC, ids, out, log_sum, d_out_BTHC), (k, v, key_ids)
        )
        dq_second, *d_second = form.backward(q, k, v, _unmasked(q_ids, key_ids), *rest)
        dq_early += jnp.where(early, dq_second, 0)
        dq_late += jnp.where(early, 0, dq_second)
        dk, dv = (
            a + _join(first.astype(f32) + jnp.where(early, more, 0), jnp.where(early, 0, more))
            for a, first, more in zip((dk, dv), d_first, d_second, strict=True)
        )
    dk, dv = _next((dk, dv))
    dq = _join(dq_early, dq_late).astype(q_BTHC.dtype)
    return dq, dk.astype(k_BTKC.dtype), dv.astype(v_BTKC.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


# --- a window's halo ------------------------------------------------------------------------------


def _halo(q_BTHC, k_BTKC, v_BTKC, mask: AttentionMask, kernels: Kernels):
    """Each chunk's keys, and before them the last window - 1 of the chunk before: the early
    chunk's is the early one of the device before, the late chunk's the late one of the device
    after. Both chunks as rows of one call."""
    n, reach, c = lax.axis_size(AXIS), mask.window - 1, q_BTHC.shape[1] // 2
    last = lax.axis_index(AXIS) == n - 1

    def with_halo(a):
        early, late = _halves(a)
        tail = early[:, c - reach :]
        before = lax.ppermute(tail, AXIS, [(i, i + 1) for i in range(n - 1)])
        after = lax.ppermute(late[:, c - reach :], AXIS, [(i + 1, i) for i in range(n - 1)])
        before_late = jnp.where(last, tail, after)
        return jnp.concatenate([_join(before, early), _join(before_late, late)], axis=0)

    ids = mask.segment_ids_BT
    ids = ids if ids is not None else jnp.zeros(q_BTHC.shape[:2], jnp.int32)
    # Nothing comes before the first chunk: a device that is sent nothing has zeros, here -1, a
    # segment that no query has.
    key_ids = with_halo(ids + 1) - 1
    out = fused(
        jnp.concatenate(_halves(q_BTHC), axis=0),
        with_halo(k_BTKC),
        with_halo(v_BTKC),
        AttentionMask(
            mask.window,
            jnp.concatenate(_halves(ids), axis=0),
            offset=reach,
            key_segment_ids_BS=key_ids,
        ),
        kernels,
    )
    return _join(*jnp.split(out, 2, axis=0))
