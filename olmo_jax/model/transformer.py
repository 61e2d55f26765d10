"""The whole architecture: blocks of attention and MLP between an embedding and a head.

It knows nothing of training, files or devices; weights carry logical axis names, and `parallel/`
decides where those live.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.experts import Experts
from olmo_jax.model.init import Initializer, input_std
from olmo_jax.model.layers import MLP, Attention, Norm, residual
from olmo_jax.model.presets import preset
from olmo_jax.model.rope import rope_tables
from olmo_jax.ops.attention import AttentionMask, alibi_slopes
from olmo_jax.ops.embedding import embedding
from olmo_jax.ops.experts import RouterSums
from olmo_jax.ops.kernels import Kernels, pick_kernels

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "projections": jax.checkpoint_policies.save_only_these_names(
        "q", "k", "v", "context", "context_log_sum", "out", "router", "gate", "down"
    ),
}


class Block(nnx.Module):
    """One layer, attention then MLP, each with its norm and its residual add."""

    def __init__(self, init: Initializer, config: ModelConfig, kernels: Kernels):
        shape, axes = (config.n_layers, config.d_model), ("layer", "norm")
        self.attention = Attention(init, "layers.attention", config, kernels)
        mlp = Experts if config.n_experts else MLP
        self.mlp = mlp(init, "layers.mlp", config, kernels)
        self.attention_norm = Norm(init, config, shape, axes)
        self.mlp_norm = Norm(init, config, shape, axes)
        self.pre, self.parallel = config.norm_place == "pre", config.parallel_residual

    def __call__(self, x_BTD, rope, mask: AttentionMask, cache=None, weights_BT=None):
        """The residual stream after this layer, its keys and values (see Attention), and its
        router's sums (see Experts; None without experts or weights)."""
        if self.pre:
            attended, kv = self.attention(self.attention_norm(x_BTD), rope, mask, cache)
            attended = residual(attended)
        else:
            attended, kv = self.attention(x_BTD, rope, mask, cache)
            attended = self.attention_norm(residual(attended))
        h_BTD = residual(x_BTD + attended)
        mlp_in, sums = x_BTD if self.parallel else h_BTD, None
        mlp_in = self.mlp_norm(mlp_in) if self.pre else mlp_in
        if isinstance(self.mlp, Experts):
            y_BTD, sums = self.mlp(mlp_in, weights_BT)
        else:
            y_BTD = self.mlp(mlp_in)
        y_BTD = residual(y_BTD)
        y_BTD = y_BTD if self.pre else self.mlp_norm(y_BTD)
        return residual(h_BTD + y_BTD), kv, sums


class Table(nnx.Module):
    """A matrix that is not stacked over layers: the embedding, the head."""

    def __init__(self, init: Initializer, path: str, shape, axes, std):
        self.weight = init.normal(f"{path}.weight", shape, axes, std)


class Transformer(nnx.Module):
    """A decoder-only language model; `model(tokens_BT)` gives float32 logits_BTV."""

    def __init__(self, config: ModelConfig, seed: int = 0, kernels: Kernels | None = None):
        self.config = config
        self.kernels = kernels or kernels_for(config, jax.devices()[0])
        init = Initializer(seed, truncated=config.init in ("normal", "mitchell"))
        d, std = config.d_model, input_std(config)
        embed_std = config.embedding_init_std or std
        self.embed = Table(init, "embed", (config.rows, d), ("vocab", "embed"), embed_std)
        self.layers = Block(init, config, self.kernels)
        self.final_norm = Norm(init, config, (d,), ("norm",))
        self.lm_head = (
            None
            if config.tie_embeddings
            else Table(init, "lm_head", (d, config.rows), ("embed", "vocab"), std)
        )

    def head_DV(self) -> jax.Array:
        """The matrix from the final norm's output to logits."""
        if self.lm_head is None:
            return self.embed.weight[...].T
        return self.lm_head.weight[...]

    def embedded(self, tokens_BT) -> jax.Array:
        """The residual stream before the first layer."""
        return residual(embedding(self.embed.weight[...], tokens_BT, self.config.compute_dtype))

    def hidden(
        self, tokens_BT, segment_ids_BT=None, positions_BT=None, last_reader_BT=None
    ) -> jax.Array:
        """The final norm's output, (B, T, D), in the compute type. last_reader_BT: rows that hold
        trees, with their depths as positions (see AttentionMask)."""
        return self.hidden_and_routing(
            tokens_BT, segment_ids_BT, positions_BT, last_reader_BT=last_reader_BT
        )[0]

    def hidden_and_routing(
        self,
        tokens_BT,
        segment_ids_BT=None,
        positions_BT=None,
        weights_BT=None,
        last_reader_BT=None,
    ) -> tuple[jax.Array, RouterSums | None]:
        """`hidden`, and what the balancing losses need: each layer's router sums over tokens times
        weights_BT, with a leading L; None without experts or weights."""
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        ropes = rope_tables(self.config, positions_BT)
        pattern, config = self.config.window_pattern, self.config
        slopes_H = alibi_slopes(config.n_heads) if config.position == "alibi" else None
        graph, weights = nnx.split(self.layers)

        def layer(i, x_BTD, group_weights):
            weights = jax.tree.map(lambda a: a[i], group_weights)
            x_BTD, weights = _one_layer_back(x_BTD, weights)
            block = nnx.merge(graph, weights)
            mask = AttentionMask(
                pattern[i],
                segment_ids_BT,
                slopes_H,
                last_reader_BT=last_reader_BT,
                positions_BT=None if last_reader_BT is None else positions_BT,
            )
            x_BTD, _, sums = block(x_BTD, ropes.of(pattern[i]), mask, None, weights_BT)
            return x_BTD, sums

        def group(x_BTD, group_weights):
            sums = []
            for i in range(len(pattern)):
                run: Callable = partial(layer, i)
                if config.remat != "none":
                    run = jax.checkpoint(run, policy=_REMAT_POLICIES[config.remat])
                x_BTD, layer_sums = run(x_BTD, group_weights)
                sums.append(layer_sums)
            return x_BTD, jax.tree.map(lambda *a: jnp.stack(a), *sums)

        x_BTD = self.embedded(tokens_BT)
        if self.kernels.layers == "unrolled":
            groups = []
            for group_weights in _unstacked(weights, len(pattern)):
                x_BTD, group_sums = group(x_BTD, group_weights)
                groups.append(group_sums)
            sums = jax.tree.map(lambda *a: jnp.concatenate(a), *groups)
        else:
            grouped = jax.tree.map(lambda a: a.reshape(-1, len(pattern), *a.shape[1:]), weights)
            x_BTD, sums = jax.lax.scan(group, x_BTD, grouped)
            sums = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sums)
        return residual(self.final_norm(x_BTD)), sums

    def logits(self, x_BTD) -> jax.Array:
        """The head's float32 logits (B, T, V) of the final norm's output."""
        head_DV = self.head_DV().astype(x_BTD.dtype)
        return jnp.dot(x_BTD, head_DV, preferred_element_type=jnp.float32)

    def __call__(self, tokens_BT, segment_ids=None, positions=None) -> jax.Array:
        """float32 logits (B, T, V) of integer tokens (B, T).

        segment_ids (B, T): attention stays within equal ids. positions (B, T): rotary positions,
        0, 1, 2, … where not given.
        """
        return self.logits(self.hidden(jnp.asarray(tokens_BT), segment_ids, positions))


@jax.custom_vjp
def _one_layer_back(x_BTD, weights):
    """A layer's arguments as they are. In the backward pass the layer before it starts when this
    one's weight gradients are added up over devices: else a compiler with memory to spare keeps
    whole float32 ones of all the layers of a group at once."""
    return x_BTD, weights


_one_layer_back.defvjp(
    lambda x_BTD, weights: ((x_BTD, weights), None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)


def _unstacked(weights, size: int) -> list:
    """Stacked weights as a list of groups of `size` layers, by one split whose gradient is one
    concatenation (that of indexing would add up as many whole stacks as there are layers)."""
    leaves, structure = jax.tree.flatten(weights)
    parts = [jax.lax.split(a, [size] * (a.shape[0] // size)) for a in leaves]
    return [jax.tree.unflatten(structure, group) for group in zip(*parts, strict=True)]


def kernels_for(
    config: ModelConfig,
    device,
    context: Literal["gathered", "ring"] = "gathered",
    devices: int = 1,
) -> Kernels:
    """The forms of the operations for this model on so many such devices, which need not be here;
    `context` is the mesh's `context_form`."""
    picked = pick_kernels(
        device.platform,
        device.device_kind,
        head_width=config.head_width,
        alibi=config.position == "alibi",
        compute_dtype=config.compute_dtype,
        devices=devices,
    )
    return replace(picked, context=context)


def init(model: str | ModelConfig, seed: int = 0, kernels: Kernels | None = None) -> Transformer:
    """A model with random weights, as its family was initialised; `model` is a preset's name or a
    configuration. Compiled, so that a mesh's devices can each make their own part."""
    config = preset(model) if isinstance(model, str) else model
    abstract = abstract_model(config, kernels)
    return bind(abstract, jax.jit(lambda: parameters(Transformer(config, seed, kernels)))())


def abstract_model(config: ModelConfig, kernels: Kernels | None = None) -> Transformer:
    """The model's structure with shapes instead of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: Transformer(config, kernels=kernels))


def parameters(model: Transformer) -> dict:
    """The weights as a plain nested dict of arrays (or of shapes, for an abstract model)."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def bind(model: Transformer, params: dict) -> Transformer:
    """A model of the same structure that reads its weights from `params`; `model` is left alone."""
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda a: a, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def parameter_axes(model: Transformer) -> dict:
    """The logical axis names of every weight, as a nested dict like `parameters`."""
    state = nnx.state(model, nnx.Param)
    axes = jax.tree.map(
        lambda p: p.get_metadata()["axes"], state, is_leaf=lambda p: isinstance(p, nnx.Variable)
    )
    return nnx.to_pure_dict(axes)
