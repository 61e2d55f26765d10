"""The splash form of attention, TPU's: jax's Pallas kernels that skip what a mask never shows.

Scores never leave the chip's vector memory, keys and values of a head group are read once (GQA
without copies), and blocks above the diagonal or outside a window are not visited. On arrays of one
device, with `forward` and `backward` as `attention_form` asks of a form.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from olmo_jax.ops.attention_mask import AttentionMask
from olmo_jax.ops.kernels import SplashBlocks

_LANES = 128  # positions come in multiples of it
_FAR = 1e30  # a log-sum beside which every score weighs nothing


@dataclass(frozen=True)
class Splash:
    """The form with its block sizes; interpret runs the kernels as plain jax, on any platform."""

    blocks: SplashBlocks
    interpret: bool = False

    def forward(
        self, q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask: AttentionMask
    ) -> tuple[jax.Array, jax.Array]:
        """The output (B, T, H, C) in v's type, and float32 log(sum(exp(scores))), (B, T, H)."""
        T, S = q_BTHC.shape[1], k_BSKC.shape[1]
        q, k, v = _scaled(q_BTHC), _heads_first(k_BSKC), _heads_first(v_BSKC)
        kernel = self._kernel(q.shape[1], q.shape[2], k.shape[2], mask, save_residuals=True)
        out_BHTC, (log_sum_BHT,) = jax.vmap(kernel)(q, k, v, _segments(mask, T, S))
        return out_BHTC[:, :, :T].swapaxes(1, 2), log_sum_BHT[:, :, :T].swapaxes(1, 2)

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
        T, S = q_BTHC.shape[1], k_BSKC.shape[1]
        q, k, v = _scaled(q_BTHC), _heads_first(k_BSKC), _heads_first(v_BSKC)
        out, d_out = _heads_first(out_BTHC), _heads_first(d_out_BTHC)
        log_sum = _heads_first(log_sum_BTH, _FAR)
        kernel = self._kernel(q.shape[1], q.shape[2], k.shape[2], mask, save_residuals=False)

        # The kernels' own backward pass is reached below their custom_vjp, which would run the
        # forward kernel again and could not take another log-sum (a ring's).
        def one_row(q, k, v, segments, out, log_sum, d_out):
            saved = q, k, v, segments, None, out, log_sum, kernel.dq_mask_info, kernel.dkv_mask_info
            settings = {**kernel.kwargs, "res": saved, "do": d_out}
            return splash._splash_attention_bwd(**settings)[3:6]

        dq, dk, dv = jax.vmap(one_row)(q, k, v, _segments(mask, T, S), out, log_sum, d_out)
        dq = dq * q_BTHC.shape[-1] ** -0.5
        return tuple(  # type: ignore[return-value]
            a.swapaxes(1, 2)[:, : like.shape[1]].astype(like.dtype)
            for a, like in ((dq, q_BTHC), (dk, k_BSKC), (dv, v_BSKC))
        )

    def _kernel(self, H: int, T: int, S: int, mask: AttentionMask, save_residuals: bool) -> Any:
        return _kernel(
            block_sizes(self.blocks, T, S),
            H,
            (T, S),
            mask.window if mask.causal else None,
            mask.offset,
            save_residuals,
            self.interpret,
        )


def _heads_first(a_BTHx: jax.Array, fill: float = 0.0) -> jax.Array:
    """(B, H, T, …) with T filled up to whole lanes. Under a causal mask no query sees the keys so
    added; without one `_segments` hides them."""
    a = a_BTHx.swapaxes(1, 2)
    more = -a.shape[2] % _LANES
    widths = [(0, 0), (0, 0), (0, more), *[(0, 0)] * (a.ndim - 3)]
    return jnp.pad(a, widths, constant_values=fill) if more else a


def _scaled(q_BTHC: jax.Array) -> jax.Array:
    return _heads_first(q_BTHC * q_BTHC.shape[-1] ** -0.5)


def _segments(mask: AttentionMask, T: int, S: int) -> splash.SegmentIds | None:
    """The kernel's segment ids; those of added positions are no document's."""
    ids = mask.segment_ids_BT
    if ids is None:
        assert mask.causal or S % _LANES == 0, (T, S)
        return None
    key_ids = ids if mask.key_segment_ids_BS is None else mask.key_segment_ids_BS
    pad = partial(jnp.pad, constant_values=jnp.iinfo(jnp.int32).min)
    return splash.SegmentIds(
        pad(jnp.asarray(ids, jnp.int32), ((0, 0), (0, -T % _LANES))),
        pad(jnp.asarray(key_ids, jnp.int32), ((0, 0), (0, -S % _LANES))),
    )


@lru_cache(maxsize=64)
def _kernel(
    blocks: splash.BlockSizes,
    H: int,
    shape: tuple[int, int],
    window: int | None,
    offset: int,
    save_residuals: bool,
    interpret: bool,
) -> Any:
    """The kernel for H heads under a causal mask; window None is no mask, 0 is all before.

    Kept, since which blocks a mask shows is worked out by looking at each (0.1 to 1 s).
    """
    if window is None:
        mask: masks.Mask = masks.FullMask(shape)
    elif window:
        mask = masks.LocalMask(shape, (window - 1, 0), offset)
    else:
        mask = masks.CausalMask(shape, offset)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            masks.MultiHeadMask([mask] * H),
            block_sizes=blocks,
            save_residuals=save_residuals,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )


def block_sizes(blocks: SplashBlocks, T: int, S: int) -> splash.BlockSizes:
    """The largest blocks up to `blocks` that divide T and S (both multiples of 128)."""
    q, kv = math.gcd(T, blocks.q), math.gcd(S, blocks.kv)
    q_back, kv_back = math.gcd(T, blocks.q_back), math.gcd(S, blocks.kv_back)
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=math.gcd(kv, blocks.kv_compute),
        block_q_dkv=q_back,
        block_kv_dkv=kv_back,
        block_kv_dkv_compute=math.gcd(kv_back, blocks.kv_back_compute),
        block_q_dq=None if blocks.fused else q_back,
        block_kv_dq=None if blocks.fused else kv_back,
        use_fused_bwd_kernel=blocks.fused,
    )
