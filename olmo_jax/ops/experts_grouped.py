"""The grouped form of the experts, for CPU.

Token copies are sorted by expert and taken in blocks of R rows, each within one expert's group:
at most M / R + E blocks, of which a loop runs the used ones. A block is a few 2-D products, and
nothing of width D is kept for the copies: rows are gathered from x and added to y inside the
loop. A group's last block reaches into the next group: its rows there count for nothing, and the
block that they belong to overwrites what they left in `hidden`. `jax.lax.ragged_dot` is about
100 times a dense product at 64 experts on XLA:CPU.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class _Blocks(NamedTuple):
    """M token copies in order of their expert, and the blocks they are taken in."""

    copy_M: jax.Array
    """Copy a of token n has the number n · A + a."""
    token_M: jax.Array
    """The copies' tokens, with R entries more, so that the last block may reach over the end."""
    expert_J: jax.Array
    start_J: jax.Array
    """Each block's first row among the sorted copies."""
    rows_J: jax.Array
    """How many rows belong to the block, at most R."""
    used: jax.Array
    """How many of the J blocks there are."""


def _block_rows(copies: int, n_experts: int) -> int:
    """R: about half an expert's share, a power of two from 8 to 256.

    Smaller blocks waste less in a group's last one, larger ones multiply faster (4096 tokens,
    d 256, 8 of 64 experts of width 128: 256 rows 171 ms, 128 rows 200 ms, 64 rows 250 ms).
    """
    share = max(1, copies // n_experts)
    return min(256, max(8, 1 << (share // 2).bit_length()))


def _blocks(chosen_NA: jax.Array, n_experts: int, R: int) -> _Blocks:
    """The blocks of experts 0 … n_experts - 1; copies with a higher number are in none."""
    N, A = chosen_NA.shape
    M = N * A
    assert (n_experts + 1) * M < 2**31, (n_experts, M)
    # One sort of expert · M + copy: five times as fast as a sort of pairs.
    key_M = jnp.sort(chosen_NA.reshape(-1) * M + jnp.arange(M, dtype=jnp.int32))
    copy_M = key_M % M
    group_E1 = jnp.searchsorted(key_M, jnp.arange(n_experts + 1, dtype=jnp.int32) * M)
    group_E1 = group_E1.astype(jnp.int32)
    end_E = jnp.cumsum((jnp.diff(group_E1) + R - 1) // R)  # blocks up to and with each expert's
    block_J = jnp.arange(-(-M // R) + n_experts, dtype=jnp.int32)
    expert_J = jnp.searchsorted(end_E, block_J, side="right").clip(max=n_experts - 1)
    first_E = jnp.concatenate([jnp.zeros(1, end_E.dtype), end_E[:-1]])
    start_J = group_E1[expert_J] + (block_J - first_E[expert_J]) * R
    return _Blocks(
        copy_M,
        jnp.pad(copy_M // A, (0, R)),
        expert_J,
        start_J,
        jnp.minimum(group_E1[expert_J + 1] - start_J, R),
        end_E[-1],
    )


def forward(
    x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD, parts: int
) -> tuple[jax.Array, Any]:
    """The weighted sum of the chosen experts' outputs, float32, and what `backward` needs.

    Products in the weights' type, which is x's. chosen_NA at E and above: another device's
    expert, which adds nothing here; all devices together have `parts` times E.
    """
    E, _, F = gate_EDF.shape
    dtype, f32, M = x_ND.dtype, jnp.float32, chosen_NA.size
    R = _block_rows(M // parts, E)
    blocks = _blocks(chosen_NA, E, R)
    weights_M = jnp.pad(weights_NA.reshape(-1)[blocks.copy_M], (0, R))
    in_EDG, down = jnp.concatenate([gate_EDF, up_EDF], axis=2), down_EFD

    def block(j, carry):
        y_ND, hidden_MG = carry
        e, start = blocks.expert_J[j], blocks.start_J[j]
        token_R = lax.dynamic_slice_in_dim(blocks.token_M, start, R)
        weight_R = lax.dynamic_slice_in_dim(weights_M, start, R)
        weight_R = jnp.where(jnp.arange(R) < blocks.rows_J[j], weight_R, 0)
        hidden_RG = jnp.dot(_rows(x_ND, token_R), in_EDG[e])
        gate, up = hidden_RG[:, :F].astype(f32), hidden_RG[:, F:].astype(f32)
        out_RF = (jax.nn.silu(gate) * up * weight_R[:, None]).astype(dtype)
        y_RD = jnp.dot(out_RF, down[e], preferred_element_type=f32)
        y_ND = y_ND.at[token_R].add(y_RD, mode="promise_in_bounds")
        return y_ND, lax.dynamic_update_slice_in_dim(hidden_MG, hidden_RG, start, 0)

    zeros = jnp.zeros(x_ND.shape, f32), jnp.zeros((M + R, 2 * F), dtype)
    y_ND, hidden_MG = lax.fori_loop(0, blocks.used, block, zeros)
    return y_ND, (x_ND, weights_M, blocks, hidden_MG)


def backward(saved, gate_EDF, up_EDF, down_EFD, dy_ND) -> tuple[jax.Array, ...]:
    """float32 gradients of x, weights_NA, gate, up and down."""
    x_ND, weights_M, blocks, hidden_MG = saved
    F, dtype, f32 = gate_EDF.shape[2], x_ND.dtype, jnp.float32
    M, R = blocks.copy_M.size, blocks.token_M.size - blocks.copy_M.size
    in_EDG, down = jnp.concatenate([gate_EDF, up_EDF], axis=2), down_EFD

    def block(j, carry):
        dx_ND, dweights_M, din_EDG, ddown_EFD = carry
        e, start = blocks.expert_J[j], blocks.start_J[j]
        token_R = lax.dynamic_slice_in_dim(blocks.token_M, start, R)
        weight_R1 = lax.dynamic_slice_in_dim(weights_M, start, R)[:, None]
        hidden_RG = lax.dynamic_slice_in_dim(hidden_MG, start, R).astype(f32)
        own_R1 = jnp.arange(R)[:, None] < blocks.rows_J[j]
        x_RD, dy_RD = _rows(x_ND, token_R), jnp.where(own_R1, _rows(dy_ND, token_R), 0)
        gate, up = hidden_RG[:, :F], hidden_RG[:, F:]
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        dout_RF = jnp.dot(dy_RD, down[e].T, preferred_element_type=f32)
        dweight_R = jnp.sum(dout_RF * silu * up, axis=1)
        dout_RF *= weight_R1
        dgate = dout_RF * up * (sigmoid + silu * (1 - sigmoid))
        dhidden_RG = jnp.concatenate([dgate, dout_RF * silu], axis=1).astype(dtype)
        dx_RD = jnp.dot(dhidden_RG, in_EDG[e].T, preferred_element_type=f32)
        din_DG = jnp.dot(x_RD.T, dhidden_RG, preferred_element_type=f32)
        out_RF = (silu * up * weight_R1).astype(dtype)
        ddown_FD = jnp.dot(out_RF.T, dy_RD, preferred_element_type=f32)
        return (
            dx_ND.at[token_R].add(dx_RD, mode="promise_in_bounds"),
            lax.dynamic_update_slice_in_dim(dweights_M, dweight_R, start, 0),
            din_EDG.at[e].add(din_DG),
            ddown_EFD.at[e].add(ddown_FD),
        )

    shapes = x_ND.shape, (M + R,), in_EDG.shape, down.shape
    zeros = tuple(jnp.zeros(shape, f32) for shape in shapes)
    dx_ND, dweights_M, din_EDG, ddown_EFD = lax.fori_loop(0, blocks.used, block, zeros)
    dweights = jnp.zeros(M, f32).at[blocks.copy_M].set(dweights_M[:M], unique_indices=True)
    dgate_EDF, dup_EDF = jnp.split(din_EDG, 2, axis=2)
    return dx_ND, dweights.reshape(x_ND.shape[0], -1), dgate_EDF, dup_EDF, ddown_EFD


def _rows(x_ND, token_R):
    return jnp.take(x_ND, token_R, axis=0, mode="clip")
