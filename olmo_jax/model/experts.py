"""The MLP of a mixture-of-experts layer: a router, and E SwiGLU experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.init import Initializer, input_std, output_std
from olmo_jax.ops.experts import RouterSums, mixture
from olmo_jax.ops.kernels import Kernels
from olmo_jax.ops.linear import linear


class Stack(nnx.Module):
    """A weight with leading layer axis; used without it, in float32."""

    def __init__(self, init: Initializer, path: str, config: ModelConfig, shape, axes, std):
        shape, axes = (config.n_layers, *shape), ("layer", *axes)
        self.weight = init.normal(f"{path}.weight", shape, axes, std)


class Experts(nnx.Module):
    """Each token's sum over its most probable experts (see ops/experts.py)."""

    def __init__(self, init: Initializer, path: str, config: ModelConfig, kernels: Kernels):
        d, f, e = config.d_model, config.mlp_width, config.n_experts
        std, out_std = input_std(config), output_std(config, f)

        def make(name, shape, axes, std):
            return Stack(init, f"{path}.{name}", config, shape, axes, std)

        self.router = make("router", (d, e), ("embed", "router"), std)
        self.gate = make("gate", (e, d, f), ("expert", "embed", "mlp"), std)
        self.up = make("up", (e, d, f), ("expert", "embed", "mlp"), std)
        self.down = make("down", (e, f, d), ("expert", "mlp", "embed"), out_std)
        self.flat = kernels.linear == "flat"
        normalize = config.normalize_expert_weights
        forms = kernels.experts, kernels.exchange
        self.options = config.experts_per_token, normalize, forms

    def __call__(self, x_BTD, weights_BT=None) -> tuple[jax.Array, RouterSums | None]:
        """The output, and the router's sums over tokens times weights_BT, where those are given."""
        router_DE = self.router.weight[...]
        logits_BTE = linear(x_BTD.astype(jnp.float32), router_DE, ("embed", "router"), self.flat)
        # A remat policy that keeps only some outputs keeps this small one, so that the backward
        # pass routes as the forward pass did.
        logits_BTE = checkpoint_name(logits_BTE, "router")
        gate, up, down = (m.weight[...] for m in (self.gate, self.up, self.down))
        y_BTD, sums = mixture(x_BTD, logits_BTE, weights_BT, gate, up, down, *self.options)
        return checkpoint_name(y_BTD, "down"), sums
