"""The cuDNN form of attention, NVIDIA GPUs': fused kernels that keep no scores in memory.

On arrays of one device, with `forward` and `backward` as `attention_form` asks of a form. What
cuDNN does not do as it is asked for here (queries that begin behind the keys, documents) is brought
into a shape that it does.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from olmo_jax.ops import attention_blocked
from olmo_jax.ops.attention_mask import NEVER, AttentionMask
from olmo_jax.ops.cudnn import Pattern, gradient_call, softmax_call

_FAR = 1e30  # a log-sum beside which every score weighs nothing


@dataclass(frozen=True)
class Cudnn:
    """The form; packed says whether the GPU takes rows of several documents (from Hopper on)."""

    packed: bool = True

    def forward(
        self, q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask: AttentionMask
    ) -> tuple[jax.Array, jax.Array]:
        """The output (B, T, H, C) in v's type, and float32 log(sum(exp(scores))), (B, T, H)."""
        ids = mask.segment_ids_BT
        if not mask.causal:
            part = _seen_part(mask, q_BTHC.shape[1], k_BSKC.shape[1])
            return part.forward(q_BTHC, k_BSKC, v_BSKC)
        if ids is not None and not self.packed:
            return attention_blocked.forward(q_BTHC, k_BSKC, v_BSKC, mask)
        more = mask.offset
        q = _behind(q_BTHC, more)
        if ids is None:
            out, log_sum = softmax_call(q, k_BSKC, v_BSKC, Pattern("CAUSAL", mask.window))
            log_sum = log_sum.swapaxes(1, 2)
        else:
            out, log_sum = _packed_forward(q, k_BSKC, v_BSKC, _key_ids(mask), mask.window)
        return out[:, more:], log_sum[:, more:]

    def backward(
        self,
        q_BTHC: jax.Array,
        k_BSKC: jax.Array,
        v_BSKC: jax.Array,
        mask: AttentionMask,
        out_BTHC: jax.Array,
        log_sum_BTH: jax.Array,
        d_out_BTHC: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients of q, k and v, in their types; out and log_sum may be over more keys."""
        ids = mask.segment_ids_BT
        out, d_out = (a.astype(q_BTHC.dtype) for a in (out_BTHC, d_out_BTHC))
        if not mask.causal:
            part = _seen_part(mask, q_BTHC.shape[1], k_BSKC.shape[1])
            return part.backward(q_BTHC, k_BSKC, v_BSKC, out, log_sum_BTH, d_out)
        if ids is not None and not self.packed:
            return attention_blocked.backward(q_BTHC, k_BSKC, v_BSKC, mask, out, log_sum_BTH, d_out)
        more = mask.offset
        q, out, d_out = (_behind(a, more) for a in (q_BTHC, out, d_out))
        log_sum = _behind(log_sum_BTH, more, _FAR)
        if ids is None:
            stats, pattern = log_sum.swapaxes(1, 2), Pattern("CAUSAL", mask.window)
            dq, dk, dv = gradient_call(q, k_BSKC, v_BSKC, stats, d_out, out, pattern)
        else:
            dq, dk, dv = _packed_backward(
                q, k_BSKC, v_BSKC, _key_ids(mask), mask.window, out, log_sum, d_out
            )
        return dq[:, more:], dk, dv


def _behind(a_BTx: jax.Array, more: int, fill: float = 0.0) -> jax.Array:
    """With `more` positions in front, so that queries begin where keys do: cuDNN's causal mask has
    the first query see the first key alone. Their outputs are dropped."""
    if not more:
        return a_BTx
    return jnp.pad(a_BTx, [(0, 0), (more, 0), *[(0, 0)] * (a_BTx.ndim - 2)], constant_values=fill)


def _key_ids(mask: AttentionMask):
    return mask.segment_ids_BT if mask.key_segment_ids_BS is None else mask.key_segment_ids_BS


# --- queries after all keys -----------------------------------------------------------------------


class _SeenPart(NamedTuple):
    """Keys that all come before all queries, as in a ring. With documents, only the last one of the
    keys can reach into the queries, and is their first: a range of each, which cuDNN's padding mask
    shows once the keys are turned round."""

    lengths: tuple[jax.Array, ...]
    """int32 (B,) of queries and of turned keys, at least 1; empty where all is seen."""
    seen_BT: jax.Array | None
    seen_BS: jax.Array | None

    @property
    def pattern(self) -> Pattern:
        return Pattern("PADDING" if self.lengths else "NO_MASK", arguments=self.lengths)

    def _turned(self, a_BSKC):
        return a_BSKC[:, ::-1] if self.lengths else a_BSKC

    def forward(self, q, k, v):
        out, log_sum = softmax_call(q, self._turned(k), self._turned(v), self.pattern)
        log_sum = log_sum.swapaxes(1, 2)
        return _where(self.seen_BT, out, 0), _where(self.seen_BT, log_sum, NEVER)

    def backward(self, q, k, v, out, log_sum, d_out):
        stats = _where(self.seen_BT, log_sum, _FAR).swapaxes(1, 2)
        d_out = _where(self.seen_BT, d_out, 0)
        dq, dk, dv = gradient_call(
            q, self._turned(k), self._turned(v), stats, d_out, out, self.pattern
        )
        dk, dv = (_where(self.seen_BS, self._turned(a), 0) for a in (dk, dv))
        return _where(self.seen_BT, dq, 0), dk, dv


def _seen_part(mask: AttentionMask, T: int, S: int) -> _SeenPart:
    if mask.segment_ids_BT is None:
        return _SeenPart((), None, None)
    ids_BT, key_ids_BS = jnp.asarray(mask.segment_ids_BT), jnp.asarray(_key_ids(mask))
    last_B1 = key_ids_BS[:, -1:]
    queries_B = jnp.sum(jnp.cumprod(ids_BT == last_B1, axis=1, dtype=jnp.int32), axis=1)
    keys_B = jnp.sum(jnp.cumprod(key_ids_BS[:, ::-1] == last_B1, axis=1, dtype=jnp.int32), axis=1)
    seen_BT = jnp.arange(T) < queries_B[:, None]
    seen_BS = (jnp.arange(S) >= S - keys_B[:, None]) & (queries_B[:, None] > 0)
    return _SeenPart((jnp.maximum(queries_B, 1), keys_B), seen_BT, seen_BS)


def _where(seen_BT, a_BTx, other: float):
    if seen_BT is None:
        return a_BTx
    return jnp.where(seen_BT.reshape(*seen_BT.shape, *[1] * (a_BTx.ndim - 2)), a_BTx, other)


# --- documents ------------------------------------------------------------------------------------
#
# cuDNN takes the tokens of all rows as one list and documents as ranges of it. How many there may
# be is static, while a row may hold any number: as many calls as it takes, mostly one. A document
# is a run of equal ids, and padding is one too.


def _slots(B: int, T: int) -> int:
    """Documents a row in one call. Its statistics are this many times as large as they need be."""
    return min(64, max(4, T // 512))


class _Documents(NamedTuple):
    """Which document each token is in, counted over all rows, and where in it."""

    first_BT: jax.Array
    number_BT: jax.Array
    place_BT: jax.Array


def _documents(ids_BT: jax.Array) -> _Documents:
    B, T = ids_BT.shape
    starts_row = jnp.ones((B, 1), bool)
    first_BT = jnp.concatenate([starts_row, ids_BT[:, 1:] != ids_BT[:, :-1]], axis=1)
    number_BT = jnp.cumsum(first_BT.reshape(-1), dtype=jnp.int32).reshape(B, T) - 1
    index_T = jnp.arange(T, dtype=jnp.int32)
    start_BT = lax.cummax(jnp.where(first_BT, index_T, 0), axis=1)
    return _Documents(first_BT, number_BT, index_T - start_BT)


def _ranges(documents: _Documents, call: jax.Array, q_width: int, kv_width: int):
    """Lengths (B, M) and offsets (B, M + 1) of the documents of one call, packed to the left, as
    the arguments of a packed call: lengths and offsets of queries and of keys."""
    B, T = documents.first_BT.shape
    M = _slots(B, T)
    assert B * T * max(q_width, kv_width) < 2**31, (B, T, q_width)
    begin = call * B * M
    number_BT = documents.number_BT
    here = documents.first_BT & (number_BT >= begin) & (number_BT <= begin + B * M)
    (start,) = jnp.nonzero(here.reshape(-1), size=B * M + 1, fill_value=B * T)
    start = start.astype(jnp.int32)
    lengths = jnp.diff(start).reshape(B, M)
    offsets = jnp.pad(start, (0, B - 1), constant_values=B * T).reshape(B, M + 1)
    return lengths, lengths, offsets * q_width, offsets * kv_width


def _each_call(documents: _Documents, step, results):
    """`step(call, slot_BT, is_here_BT)` for every call that has documents; its outputs are written
    into `results` where tokens are of that call."""
    B, T = documents.first_BT.shape
    slots = B * _slots(B, T)

    def body(carry):
        call, results = carry
        slot_BT = documents.number_BT - call * slots
        is_here_BT = (slot_BT >= 0) & (slot_BT < slots)
        new = step(call, slot_BT, is_here_BT)
        merged = (_where(is_here_BT, a, b) for a, b in zip(new, results, strict=True))
        return call + 1, tuple(merged)

    count = documents.number_BT[-1, -1] + 1
    return lax.while_loop(lambda carry: carry[0] * slots < count, body, (jnp.int32(0), results))[1]


def _packed_forward(q_BTHC, k_BTKC, v_BTKC, ids_BT, window: int):
    B, T, H, C = q_BTHC.shape
    M, kv_width = _slots(B, T), k_BTKC.shape[2] * C
    documents = _documents(jnp.asarray(ids_BT))

    def step(call, slot_BT, is_here_BT):
        ranges = _ranges(documents, call, H * C, kv_width)
        pattern = Pattern("PADDING_CAUSAL", window, M, ranges)
        out_BTHC, stats_XHT = softmax_call(q_BTHC, k_BTKC, v_BTKC, pattern)
        slot_BT = jnp.clip(slot_BT, 0, B * M - 1)
        return out_BTHC, stats_XHT[slot_BT, :, documents.place_BT]

    zeros = jnp.zeros_like(q_BTHC), jnp.zeros((B, T, H), jnp.float32)
    return _each_call(documents, step, zeros)


def _packed_backward(q_BTHC, k_BTKC, v_BTKC, ids_BT, window: int, out, log_sum_BTH, d_out):
    B, T, H, C = q_BTHC.shape
    M, kv_width = _slots(B, T), k_BTKC.shape[2] * C
    documents = _documents(jnp.asarray(ids_BT))

    def step(call, slot_BT, is_here_BT):
        ranges = _ranges(documents, call, H * C, kv_width)
        pattern = Pattern("PADDING_CAUSAL", window, M, ranges)
        slot_BT = jnp.where(is_here_BT, slot_BT, B * M)  # elsewhere: out of bounds, dropped
        stats_XHT = jnp.zeros((B * M, H, T), jnp.float32)
        stats_XHT = stats_XHT.at[slot_BT, :, documents.place_BT].set(log_sum_BTH, mode="drop")
        return gradient_call(q_BTHC, k_BTKC, v_BTKC, stats_XHT, d_out, out, pattern)

    zeros = tuple(jnp.zeros_like(a) for a in (q_BTHC, k_BTKC, v_BTKC))
    return _each_call(documents, step, zeros)
