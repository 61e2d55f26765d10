"""The ragged form of the experts, for TPU and GPU: token copies sorted by expert, and XLA's own
grouped product. (On XLA:CPU it is about 100 times a dense product at 64 experts.)"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_F32 = jnp.float32


def forward(
    x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD, parts: int
) -> tuple[jax.Array, Any]:
    """As experts_grouped.forward."""
    del parts
    E, A = gate_EDF.shape[0], chosen_NA.shape[1]
    copy_M = jnp.argsort(chosen_NA.reshape(-1), stable=True)
    sizes_E = jnp.sum(chosen_NA.reshape(-1, 1) == jnp.arange(E), axis=0, dtype=jnp.int32)
    # The copies of other devices' experts come last, in no group: what a product leaves there is
    # not looked at.
    own_M1 = (jnp.arange(copy_M.size) < jnp.sum(sizes_E))[:, None]
    x_MD = x_ND[copy_M // A]
    gate_MF = jnp.where(own_M1, lax.ragged_dot(x_MD, gate_EDF, sizes_E), 0)
    up_MF = jnp.where(own_M1, lax.ragged_dot(x_MD, up_EDF, sizes_E), 0)
    weights_M1 = jnp.where(own_M1, weights_NA.reshape(-1)[copy_M][:, None], 0)
    hidden_MF = _hidden(gate_MF, up_MF, weights_M1).astype(x_ND.dtype)
    out_MD = jnp.where(own_M1, lax.ragged_dot(hidden_MF, down_EFD, sizes_E), 0)
    y_ND = jnp.zeros(x_ND.shape, _F32).at[copy_M // A].add(out_MD.astype(_F32))
    return y_ND, (x_ND, weights_M1, copy_M, sizes_E, own_M1, gate_MF, up_MF)


def backward(saved, gate_EDF, up_EDF, down_EFD, dy_ND) -> tuple[jax.Array, ...]:
    """As experts_grouped.backward."""
    x_ND, weights_M1, copy_M, sizes_E, own_M1, gate_MF, up_MF = saved
    dtype, N = x_ND.dtype, x_ND.shape[0]
    A = copy_M.size // N
    token_M = copy_M // A
    x_MD, dy_MD = x_ND[token_M], dy_ND[token_M]
    gate, up = gate_MF.astype(_F32), up_MF.astype(_F32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dout_MF = jnp.where(own_M1, _by_group(dy_MD, down_EFD, sizes_E), 0)
    dweights_M = jnp.sum(dout_MF * silu * up, axis=1)
    dout_MF *= weights_M1
    dgate_MF = (dout_MF * up * (sigmoid + silu * (1 - sigmoid))).astype(dtype)
    dup_MF = (dout_MF * silu).astype(dtype)
    dx_MD = _by_group(dgate_MF, gate_EDF, sizes_E) + _by_group(dup_MF, up_EDF, sizes_E)
    dx_ND = jnp.zeros(x_ND.shape, _F32).at[token_M].add(jnp.where(own_M1, dx_MD, 0))
    hidden_MF = _hidden(gate_MF, up_MF, weights_M1).astype(dtype)
    dweights = jnp.zeros(copy_M.size, _F32).at[copy_M].set(dweights_M, unique_indices=True)
    return (
        dx_ND,
        dweights.reshape(N, A),
        _over_group(x_MD, dgate_MF, sizes_E),
        _over_group(x_MD, dup_MF, sizes_E),
        _over_group(hidden_MF, dy_MD, sizes_E),
    )


def _hidden(gate_MF, up_MF, weights_M1):
    return jax.nn.silu(gate_MF.astype(_F32)) * up_MF.astype(_F32) * weights_M1


def _by_group(a_MO, w_EIO, sizes_E):
    """Each row times its group's transposed matrix, (M, I) in float32."""
    dims = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    return lax.ragged_dot_general(a_MO, w_EIO, sizes_E, dims, preferred_element_type=_F32)


def _over_group(a_MI, b_MO, sizes_E):
    """Each group's sum of outer products of its rows, (E, I, O) in float32."""
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return lax.ragged_dot_general(a_MI, b_MO, sizes_E, dims, preferred_element_type=_F32)
