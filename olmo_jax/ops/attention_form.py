"""The forms of attention: each two functions on the arrays of one device.

    forward(q_BTHC, k_BSKC, v_BSKC, mask) -> (out_BTHC, log_sum_BTH)
    backward(q, k, v, mask, out, log_sum, d_out) -> (dq, dk, dv)

log_sum is float32 log(sum(exp(scores))). In `backward` the output and log_sum may be over more keys
than k and v hold (a ring's other parts); the gradients are then these keys' share.
"""

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.ops import attention_blocked
from olmo_jax.ops.attention_gpu import Cudnn
from olmo_jax.ops.attention_mask import AttentionMask
from olmo_jax.ops.kernels import Kernels


def form_of(kernels: Kernels) -> Any:
    """The chosen form's module or object; "reference" has none, and is met by "blocked"."""
    if kernels.attention == "splash":
        from olmo_jax.ops.attention_tpu import Splash  # here: Pallas is slow to import

        assert kernels.splash is not None
        return Splash(kernels.splash)
    if kernels.attention.startswith("cudnn"):
        return Cudnn(packed=kernels.attention == "cudnn")
    return attention_blocked


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask: AttentionMask, kernels: Kernels
) -> jax.Array:
    """A form's output, with its own backward pass."""
    if (
        mask.last_reader_BT is not None
    ):  # only the blocked form knows trees, and no gradient of them
        return attention_blocked.forward(q_BTHC, k_BSKC, v_BSKC, mask)[0]
    return form_of(kernels).forward(q_BTHC, k_BSKC, v_BSKC, mask)[0]


def _forward(q_BTHC, k_BSKC, v_BSKC, mask, kernels):
    out, log_sum = named(*form_of(kernels).forward(q_BTHC, k_BSKC, v_BSKC, mask))
    return out, (q_BTHC, k_BSKC, v_BSKC, mask, out, log_sum)


def _backward(kernels, saved, d_out_BTHC):
    return *form_of(kernels).backward(*saved, d_out_BTHC), None


fused.defvjp(_forward, _backward)


def named(out_BTHC: jax.Array, log_sum_BTH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both under the names of a remat policy that keeps them and so saves the forward pass."""
    return checkpoint_name(out_BTHC, "context"), checkpoint_name(log_sum_BTH, "context_log_sum")
