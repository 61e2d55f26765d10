"""Mixture of SwiGLU experts without dropped tokens: routing, the experts' products, balance.

Every token visits its A most probable experts, however many others chose the same ones. Shapes are
static; only how much of them is used depends on the routing.

On a mesh the experts are cut over `expert`, and so are the batch's rows: tokens travel to the
devices that hold their experts, and the sums come back (exchange.py, with what it costs).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from olmo_jax.ops import experts_grouped, experts_ragged
from olmo_jax.ops.exchange import away, find_paths, home
from olmo_jax.parallel.mesh import current_mesh
from olmo_jax.parallel.sharding import cuts


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


def mixture(
    x_BTD: jax.Array,
    logits_BTE: jax.Array,
    weights_BT: jax.Array | None,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    per_token: int,
    normalize: bool,
    forms: tuple[str, str],
) -> tuple[jax.Array, RouterSums | None]:
    """Routing, experts and, where the tokens' weights are given, the router's sums over them.

    forms are `Kernels.experts` and `Kernels.exchange`.
    """
    run = partial(_mixture, per_token=per_token, normalize=normalize, forms=forms)
    mesh = current_mesh()
    if mesh is None:
        return run(x_BTD, logits_BTE, weights_BT, gate_EDF, up_EDF, down_EFD)
    rows, time = cuts(mesh, ("batch", "residual_time"), x_BTD.shape[:2])
    expert, embed, mlp = cuts(mesh, ("expert", "embed", "mlp"), gate_EDF.shape)
    embed = tuple(axis for axis in embed if axis in rows + time)
    x, into, out_of = P(rows, time, None), P(expert, embed, mlp), P(expert, mlp, embed)
    on_each_device = jax.shard_map(
        partial(run, group=expert + mlp, tokens=rows + time, embed=embed),
        in_specs=(x, x, None if weights_BT is None else P(rows, time), into, into, out_of),
        out_specs=(x, None if weights_BT is None else P()),
        check_vma=False,
    )
    return on_each_device(x_BTD, logits_BTE, weights_BT, gate_EDF, up_EDF, down_EFD)


def _mixture(
    x_BTD,
    logits_BTE,
    weights_BT,
    gate_EDF,
    up_EDF,
    down_EFD,
    *,
    per_token: int,
    normalize: bool,
    forms: tuple[str, str],
    group: tuple[str, ...] = (),
    tokens: tuple[str, ...] = (),
    embed: tuple[str, ...] = (),
):
    """`mixture` on one device. Mesh axes: group cuts experts and their width, tokens the tokens,
    embed the experts' other width."""
    B, T, D = x_BTD.shape
    x_ND, logits_NE = x_BTD.reshape(-1, D), logits_BTE.reshape(B * T, -1)
    routing = route(logits_NE, per_token, normalize)
    sums = None
    if weights_BT is not None:
        sums = router_sums(logits_NE, routing, weights_BT.reshape(-1))
        sums = lax.psum(sums, tokens) if tokens else sums
    E, here = logits_NE.shape[1], gate_EDF.shape[0]
    # Along `tensor` each device has a part of every expert's width, so all tokens are for all.
    gathered = tuple(axis for axis in group if axis in tokens and axis != "expert")
    inputs = x_ND, routing.weights_NA, routing.chosen_NA
    if gathered:
        inputs = jax.tree.map(lambda a: lax.all_gather(a, gathered, tiled=True), inputs)
    x, weights, chosen = inputs
    copies, first, paths = chosen.size, 0, None
    if here < E:
        first = lax.axis_index("expert") * here
        if "expert" in tokens:
            paths = find_paths(chosen // here, "expert", forms[1])
            x, weights = away(x, paths, "expert"), away(weights, paths, "expert")
            chosen = away(chosen + 1, paths, "expert") - 1  # -1 where nothing came
        chosen = chosen - first
        chosen = jnp.where((chosen >= 0) & (chosen < here), chosen, here)
    if here < per_token:  # a token visits no more than all of them
        chosen, weights = (a[:, :here] for a in lax.sort((chosen, weights), num_keys=1))
    parts = max(1, chosen.size // copies) if paths else E // here
    y_ND = experts(x, weights, chosen, gate_EDF, up_EDF, down_EFD, forms[0], embed, parts)
    if paths:
        y_ND = home(y_ND, paths, "expert")
    if gathered:
        y_ND = lax.psum_scatter(y_ND, gathered, tiled=True)
    same = tuple(axis for axis in group if axis not in tokens)
    y_ND = lax.psum(y_ND, same) if same else y_ND
    return y_ND.reshape(B, T, D), sums


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def experts(
    x_ND: jax.Array,
    weights_NA: jax.Array,
    chosen_NA: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    form: str,
    embed: tuple[str, ...] = (),
    parts: int = 1,
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, (N, D) in x's type.

    An expert is silu(x gate) * (x up), times down; products in x's type. form is `Kernels.experts`.
    On one device: chosen_NA at E and above adds nothing, these are one of `parts` parts of all
    experts, and they are cut along D over the mesh axes `embed`: cast and gathered in each pass
    anew, their gradients added up in float32.
    """
    return _forward(x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD, form, embed, parts)[0]


def _whole(matrices, dtype, embed):
    matrices = [a.astype(dtype) for a in matrices]
    if not embed:
        return matrices
    return [
        lax.all_gather(a, embed, axis=axis, tiled=True)
        for a, axis in zip(matrices, (1, 1, 2), strict=True)
    ]


def _forward(x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD, form, embed, parts):
    shards = gate_EDF, up_EDF, down_EFD
    matrices = _whole(shards, x_ND.dtype, embed)
    y_ND, saved = _FORMS[form].forward(x_ND, weights_NA, chosen_NA, *matrices, parts)
    return y_ND.astype(x_ND.dtype), (saved, shards)


def _backward(form, embed, parts, saved, dy_ND):
    saved, shards = saved
    matrices = _whole(shards, dy_ND.dtype, embed)
    dx_ND, dweights_NA, *dmatrices = _FORMS[form].backward(saved, *matrices, dy_ND)
    if embed:
        dmatrices = [
            lax.psum_scatter(a, embed, scatter_dimension=axis, tiled=True)
            for a, axis in zip(dmatrices, (1, 1, 2), strict=True)
        ]
    dmatrices = [d.astype(a.dtype) for d, a in zip(dmatrices, shards, strict=True)]
    return dx_ND.astype(dy_ND.dtype), dweights_NA, None, *dmatrices


experts.defvjp(_forward, _backward)


class _Reference:
    """Every expert on every token, with weight 0 where it was not chosen."""

    @staticmethod
    def _output(x_ND, weights_NA, gate_EDF, up_EDF, down_EFD, chosen_NA):
        dtype, f32 = x_ND.dtype, jnp.float32
        is_chosen_NAE = chosen_NA[:, :, None] == jnp.arange(gate_EDF.shape[0])
        weights_NE = jnp.sum(jnp.where(is_chosen_NAE, weights_NA[:, :, None], 0), axis=1)
        gate_NEF = jnp.einsum("nd,edf->nef", x_ND, gate_EDF).astype(f32)
        up_NEF = jnp.einsum("nd,edf->nef", x_ND, up_EDF).astype(f32)
        hidden_NEF = (jax.nn.silu(gate_NEF) * up_NEF * weights_NE[:, :, None]).astype(dtype)
        return jnp.einsum("nef,efd->nd", hidden_NEF, down_EFD).astype(f32)

    @classmethod
    def forward(cls, x_ND, weights_NA, chosen_NA, gate_EDF, up_EDF, down_EFD, parts):
        y_ND = cls._output(x_ND, weights_NA, gate_EDF, up_EDF, down_EFD, chosen_NA)
        return y_ND, (x_ND, weights_NA, chosen_NA)

    @classmethod
    def backward(cls, saved, gate_EDF, up_EDF, down_EFD, dy_ND):
        *inputs, chosen_NA = saved
        output = partial(cls._output, chosen_NA=chosen_NA)
        _, pull = jax.vjp(output, *inputs, gate_EDF, up_EDF, down_EFD)
        return pull(dy_ND.astype(jnp.float32))


_FORMS: dict[str, Any] = {
    "grouped": experts_grouped,
    "ragged": experts_ragged,
    "reference": _Reference,
}


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
