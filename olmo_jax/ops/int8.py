"""Products with weights in int8: a quarter of float32's memory, half of bfloat16's.

Only weights are rounded, symmetrically with one scale for each output; inputs keep their type.
"""

import jax
import jax.numpy as jnp
from jax import lax


def quantize(w_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 weights from -127 to 127, and the float32 scale_O that they are to be multiplied by."""
    w_OI = w_OI.astype(jnp.float32)
    largest_O = jnp.max(jnp.abs(w_OI), axis=1)
    scale_O = jnp.where(largest_O > 0, largest_O, 1) / 127
    return jnp.round(w_OI / scale_O[:, None]).astype(jnp.int8), scale_O


def product(w_OI: jax.Array, scale_O: jax.Array, x_NI: jax.Array, blocked: bool) -> jax.Array:
    """(scale W) x^T, (out, N) in float32; `blocked` is CPU's form.

    Where the weights are multiplied as they come (TPU, GPU) the conversion is a part of the
    product. The barrier ties it to x, or a loop over tokens would convert once, before it begins,
    and keep the result.
    """
    if not blocked:
        w_OI, x_NI = lax.optimization_barrier((w_OI, x_NI))
        w_OI = w_OI.astype(x_NI.dtype)
        y_ON = jnp.einsum("oi,ni->on", w_OI, x_NI, preferred_element_type=jnp.float32)
        return y_ON * scale_O[:, None]
    return _blocked(w_OI, scale_O, x_NI)


def _blocked(w_OI, scale_O, x_NI):
    """W in blocks that are converted within the cache, one after another: on one core for few rows.

    ms of processor time for 50304 x 512 weights and 1, 16, 512 rows: float32 11, 24, 517; this 6,
    20, about as float32; all of W converted before the product 92, 88, 601; multiplied and added up
    as it is converted 15, 356, -; int8 x int8 with rounded inputs 105, 16, -, and less exact.
    """
    (O, I), N = w_OI.shape, x_NI.shape[0]
    # Few rows wait for the weights; many take x apart anew for each block, and want large ones. Of
    # 8192 x 2048 weights blocks of 2^16 and 2^20 take 3.5 and 6.6 ms for 1 row, 12.7 and 14.5 for
    # 16; 2^16 and 2^19 take 143 and 132 for 256, 1682 and 639 for 1024 (float32: 138, 503).
    rows = min(O, max(1, (1 << 16 if N <= 32 else 1 << 19) // I))
    x_IN = lax.optimization_barrier(x_NI.T)

    def block(i, y_ON):
        at = jnp.minimum(i * rows, O - rows)  # the last block begins early, to be whole
        w = lax.dynamic_slice_in_dim(w_OI, at, rows)
        scale = lax.dynamic_slice_in_dim(scale_O, at, rows)
        w = lax.optimization_barrier(w.astype(x_IN.dtype))
        y = jnp.dot(w, x_IN, preferred_element_type=jnp.float32) * scale[:, None]
        return lax.dynamic_update_slice_in_dim(y_ON, y, at, 0)

    y_ON = lax.fori_loop(0, -(-O // rows), block, jnp.zeros((O, N), jnp.float32))
    return lax.optimization_barrier(y_ON)
