"""cuDNN's fused attention as XLA's custom calls, forward and backward. bfloat16.

XLA hands calls named `__cudnn$fmha…` to cuDNN, and a call that cuDNN cannot do fails to compile:
there is no silent way back to whole scores. They are made here rather than by
`jax.nn.dot_product_attention`, which has no form for documents without a (T, T) bias, and which
asks the local GPU, so that nothing could be planned without one. The arguments are those of jax's
own lowering (jax/_src/cudnn/fused_attention_stablehlo.py), to which a test holds them; jax 0.10's
packed form takes the queries' width for the keys' offsets too, which is wrong under GQA (0.12 has
it right, and so do we).
"""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Pattern(NamedTuple):
    """What a call may see, in cuDNN's terms."""

    mask_type: str
    """NO_MASK, CAUSAL (the first query sees the first key alone), PADDING (lengths of queries and
    keys), PADDING_CAUSAL (both, here of documents)."""
    window: int = 0
    """Keys that a query sees, counting itself; 0 is all."""
    documents: int = 1
    """Ranges a row, where the arrays hold more than one."""
    arguments: tuple[jax.Array, ...] = ()
    """int32 lengths of queries and of keys and, for documents, their offsets, in elements."""


def softmax_call(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, pattern: Pattern
) -> tuple[jax.Array, jax.Array]:
    """The output as BTHC, and log(sum(exp(scores))): float32 (B · documents, H, T), each
    document's from its first token on. What no range covers is undefined."""
    B, T, H, C = q_BTHC.shape
    out, stats, _ = jax.ffi.ffi_call(
        "__cudnn$fmhaSoftmax",
        (
            jax.ShapeDtypeStruct((B, H, T, C), q_BTHC.dtype),
            jax.ShapeDtypeStruct((B * pattern.documents, H, T), jnp.float32),
            _WORKSPACE,
        ),
        output_layouts=(_TIME_FIRST, None, None),
        custom_call_api_version=2,
        legacy_backend_config=_config(q_BTHC, k_BSKC, pattern, _FORWARD_PRODUCTS),
    )(q_BTHC, k_BSKC, v_BSKC, *pattern.arguments)
    return out.swapaxes(1, 2), stats


def gradient_call(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    stats: jax.Array,
    d_out_BTHC: jax.Array,
    out_BTHC: jax.Array,
    pattern: Pattern,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, laid out as these; stats and out are softmax_call's."""
    shapes = [
        jax.ShapeDtypeStruct((a.shape[0], a.shape[2], a.shape[1], a.shape[3]), a.dtype)
        for a in (q_BTHC, k_BSKC, v_BSKC)
    ]
    *gradients, _ = jax.ffi.ffi_call(
        "__cudnn$fmhaSoftmaxBackward",
        (*shapes, _WORKSPACE),
        output_layouts=(_TIME_FIRST, _TIME_FIRST, _TIME_FIRST, None),
        custom_call_api_version=2,
        legacy_backend_config=_config(q_BTHC, k_BSKC, pattern, _BACKWARD_PRODUCTS),
    )(q_BTHC, k_BSKC, v_BSKC, stats, d_out_BTHC, out_BTHC, *pattern.arguments)
    dq, dk, dv = (a.swapaxes(1, 2) for a in gradients)
    return dq, dk, dv


_WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA finds its size
_TIME_FIRST = (0, 2, 1, 3)  # results are BHTC by their shape and BTHC in memory


def _product(contracting: tuple[int, int], left_batch, right_batch) -> dict[str, list[str]]:
    left, right = contracting
    return {
        "lhs_contracting_dimensions": [str(left)],
        "rhs_contracting_dimensions": [str(right)],
        "lhs_batch_dimensions": [str(i) for i in left_batch],
        "rhs_batch_dimensions": [str(i) for i in right_batch],
    }


# Which axes each product sums over and keeps, with scores as BHTS and the rest as BTHC.
_FORWARD_PRODUCTS = {
    "bmm1_dot_dimension_numbers": _product((3, 3), (0, 2), (0, 2)),  # scores
    "bmm2_dot_dimension_numbers": _product((3, 1), (0, 1), (0, 2)),  # output
}
_BACKWARD_PRODUCTS = {
    "bmm1_grad_gemm1_dot_dimension_numbers": _product((2, 1), (0, 1), (0, 2)),  # dk
    "bmm1_grad_gemm2_dot_dimension_numbers": _product((3, 1), (0, 1), (0, 2)),  # dq
    "bmm2_grad_gemm1_dot_dimension_numbers": _product((2, 1), (0, 1), (0, 2)),  # dv
    "bmm2_grad_gemm2_dot_dimension_numbers": _product((3, 3), (0, 2), (0, 2)),  # d scores
}


def _config(q_BTHC: jax.Array, k_BSKC: jax.Array, pattern: Pattern, products: dict) -> str:
    """The call's attributes: XLA's CudnnfMHABackendConfig as JSON."""
    B, T, H, C = q_BTHC.shape
    assert q_BTHC.dtype == jnp.bfloat16, q_BTHC.dtype
    scores: dict[str, Any] = {
        "element_type": "BF16",
        "dimensions": [str(n) for n in (B, H, T, k_BSKC.shape[1])],
        "layout": {"minor_to_major": ["3", "2", "1", "0"]},
        "is_dynamic_dimension": [False] * 4,
    }
    fmha = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": C**-0.5,
        "intermediate_tensor_shape": scores,
        "is_flash_attention": True,
        "mask_type": pattern.mask_type,
        **products,
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": pattern.window,
        "max_seg_per_batch": pattern.documents,
        "is_paged_attention": False,
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": fmha})
