"""Mixture of SwiGLU experts without dropped tokens: routing, the experts' products, balance.

Every token visits its A most probable experts, however many others chose the same ones. Shapes are
static; only how much of them is used depends on the routing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Routing(NamedTuple):
    """Which experts each token visits, and with what weight."""

    weights_NA: jax.Array
    """float32; the factor on each expert's output."""
    chosen_NA: jax.Array
    """int32; experts, the most probable first."""
    probabilities_NE: jax.Array
    """float32; the router's softmax over all experts."""


class RouterSums(NamedTuple):
    """What the balancing losses need of one layer, summed over tokens times their weights.

    With token weights that add up to 1 over the global batch (micro-batches and devices added),
    these are means over it. Stacked over layers they have a leading L.
    """

    load_E: jax.Array
    """Share of the tokens that visit each expert (sums to A); carries no gradient."""
    probability_E: jax.Array
    """Mean router probability of each expert (sums to 1)."""
    z: jax.Array
    """Mean of log(sum of exp(logits))², a scalar."""


def route(logits_NE: jax.Array, per_token: int, normalize: bool) -> Routing:
    """The `per_token` (A) most probable experts of each token; softmax over all, in float32.

    normalize divides the chosen probabilities by their sum (Mixtral; OLMoE does not).
    """
    probabilities_NE = jax.nn.softmax(logits_NE.astype(jnp.float32), axis=-1)
    weights_NA, chosen_NA = lax.top_k(probabilities_NE, per_token)
    if normalize:
        weights_NA /= jnp.sum(weights_NA, axis=-1, keepdims=True)
    return Routing(weights_NA, chosen_NA, probabilities_NE)


def experts(
    x_ND: jax.Array,
    routing: Routing,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    form: str,
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, (N, D) in x's type.

    An expert is silu(x gate) * (x up), times down; products in x's type. form is `Kernels.experts`.
    """
    weights_NA, chosen_NA, _ = routing
    args = x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD
    if form == "grouped":
        return _grouped(*args)
    return _ragged(*args) if form == "ragged" else _reference(*args)


def _reference(x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD):
    """Every expert on every token, with weight 0 where it was not chosen."""
    dtype, f32 = x_ND.dtype, jnp.float32
    is_chosen_NAE = chosen_NA[:, :, None] == jnp.arange(gate_EDF.shape[0])
    weights_NE = jnp.sum(jnp.where(is_chosen_NAE, weights_NA[:, :, None], 0), axis=1)
    gate_NEF = jnp.einsum("nd,edf->nef", x_ND, gate_EDF.astype(dtype)).astype(f32)
    up_NEF = jnp.einsum("nd,edf->nef", x_ND, up_EDF.astype(dtype)).astype(f32)
    hidden_NEF = (jax.nn.silu(gate_NEF) * up_NEF * weights_NE[:, :, None]).astype(dtype)
    return jnp.einsum("nef,efd->nd", hidden_NEF, down_EFD.astype(dtype))


def _ragged(x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD):
    """Token copies sorted by expert, and XLA's own grouped product (TPU, GPU)."""
    dtype, f32, A = x_ND.dtype, jnp.float32, chosen_NA.shape[1]
    copy_M = jnp.argsort(chosen_NA.reshape(-1), stable=True)
    is_chosen = chosen_NA.reshape(-1, 1) == jnp.arange(gate_EDF.shape[0])
    sizes_E = jnp.sum(is_chosen, axis=0, dtype=jnp.int32)
    x_MD = x_ND[copy_M // A]
    gate_MF = lax.ragged_dot(x_MD, gate_EDF.astype(dtype), sizes_E).astype(f32)
    up_MF = lax.ragged_dot(x_MD, up_EDF.astype(dtype), sizes_E).astype(f32)
    weights_M1 = weights_NA.reshape(-1)[copy_M][:, None]
    hidden_MF = (jax.nn.silu(gate_MF) * up_MF * weights_M1).astype(dtype)
    out_MD = lax.ragged_dot(hidden_MF, down_EFD.astype(dtype), sizes_E)
    return jnp.zeros(x_ND.shape, f32).at[copy_M // A].add(out_MD.astype(f32)).astype(dtype)


# --- the grouped form, for CPU --------------------------------------------------------------------
#
# Token copies are sorted by expert and taken in blocks of R rows, each within one expert's group:
# at most M / R + E blocks, of which a loop runs the used ones. A block is a few 2-D products, and
# nothing of width D is kept for the copies: rows are gathered from x and added to y inside the
# loop. A group's last block reaches into the next group: its rows there count for nothing, and the
# block that they belong to overwrites what they left in `hidden`. `jax.lax.ragged_dot` is about
# 100 times a dense product at 64 experts on XLA:CPU.


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
    N, A = chosen_NA.shape
    M = N * A
    assert n_experts * M < 2**31, (n_experts, M)
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


@jax.custom_vjp
def _grouped(x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD):
    return _grouped_forward(x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD)[0]


def _grouped_forward(x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD):
    E, _, F = gate_EDF.shape
    dtype, f32, M = x_ND.dtype, jnp.float32, chosen_NA.size
    R = _block_rows(M, E)
    blocks = _blocks(chosen_NA, E, R)
    weights_M = jnp.pad(weights_NA.reshape(-1)[blocks.copy_M], (0, R))
    in_EDG, down = _joined(gate_EDF, up_EDF, dtype), down_EFD.astype(dtype)

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
    saved = x_ND, weights_M, blocks, hidden_MG, gate_EDF, up_EDF, down_EFD
    return y_ND.astype(dtype), saved


def _grouped_backward(saved, dy_ND):
    x_ND, weights_M, blocks, hidden_MG, gate_EDF, up_EDF, down_EFD = saved
    F, dtype, f32 = gate_EDF.shape[2], x_ND.dtype, jnp.float32
    M, R = blocks.copy_M.size, blocks.token_M.size - blocks.copy_M.size
    in_EDG, down = _joined(gate_EDF, up_EDF, dtype), down_EFD.astype(dtype)

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
    dgate_EDF, dup_EDF = jnp.split(din_EDG.astype(gate_EDF.dtype), 2, axis=2)
    return (
        dx_ND.astype(dtype),
        dweights.reshape(x_ND.shape[0], -1),
        None,
        dgate_EDF,
        dup_EDF,
        ddown_EFD.astype(down_EFD.dtype),
    )


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _joined(gate_EDF, up_EDF, dtype):
    """Gate and up side by side, (E, D, 2 F): one product instead of two. Made again for the
    backward pass: kept, it would be a second copy of the weights."""
    return jnp.concatenate([gate_EDF, up_EDF], axis=2).astype(dtype)


def _rows(x_ND, token_R):
    return jnp.take(x_ND, token_R, axis=0, mode="clip")


# --- balance --------------------------------------------------------------------------------------


def router_sums(logits_NE: jax.Array, routing: Routing, weights_N: jax.Array) -> RouterSums:
    """One layer's sums over tokens, each counted with its weight (0: padding)."""
    weights_N = weights_N.astype(jnp.float32)
    experts_E = jnp.arange(logits_NE.shape[1])
    is_chosen_NE = jnp.any(routing.chosen_NA[:, :, None] == experts_E, axis=1)
    log_sum_N = jax.nn.logsumexp(logits_NE.astype(jnp.float32), axis=-1)
    return RouterSums(
        load_E=lax.stop_gradient(weights_N @ is_chosen_NE.astype(jnp.float32)),
        probability_E=weights_N @ routing.probabilities_NE,
        z=weights_N @ jnp.square(log_sum_N),
    )


def load_balancing_loss(load_LE: jax.Array, probability_LE: jax.Array) -> jax.Array:
    """E / A · sum over experts of load · probability, the mean over layers; 1 when balanced.

    Shazeer et al. 2017 and Fedus et al. 2021 in megablocks' scale, which trained OLMoE.
    transformers' is A times as large, and multiplies means over all layers together instead of
    each layer's own. load_LE is the global batch's; the loss is linear in probability_LE, so that
    micro-batches and devices add up to the global batch's loss and gradient.
    """
    L, E = probability_LE.shape
    A = jnp.sum(load_LE) / L
    return E / (A * L) * jnp.sum(lax.stop_gradient(load_LE) * probability_LE)


def router_z_loss(z_L: jax.Array) -> jax.Array:
    """Mean over tokens and layers of log(sum of exp(logits))² (ST-MoE, Zoph et al. 2022).

    As OLMoE's paper and OLMo-core have it. The fork of megablocks that trained OLMoE also divides
    by A: its weight of 0.001 is 0.001 / 8 here.
    """
    return jnp.mean(z_L)
