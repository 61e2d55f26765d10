"""The MLP of a mixture-of-experts layer: a router, and E SwiGLU experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.init import Initializer, input_std, output_std
from olmo_jax.ops.experts import RouterSums, experts, route, router_sums
from olmo_jax.ops.kernels import Kernels


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

        self.router = make("router", (d, e), ("embed", "expert"), std)
        self.gate = make("gate", (e, d, f), ("expert", "embed", "mlp"), std)
        self.up = make("up", (e, d, f), ("expert", "embed", "mlp"), std)
        self.down = make("down", (e, f, d), ("expert", "mlp", "embed"), out_std)
        self.per_token, self.normalize = config.experts_per_token, config.normalize_expert_weights
        self.form = kernels.experts

    def __call__(self, x_BTD, weights_BT=None) -> tuple[jax.Array, RouterSums | None]:
        """The output, and the router's sums over tokens times weights_BT, where those are given."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        router_DE = self.router.weight[...].astype(x_ND.dtype)
        logits_NE = jnp.dot(x_ND, router_DE, preferred_element_type=jnp.float32)
        # A remat policy that keeps only some outputs keeps this small one, so that the backward
        # pass routes as the forward pass did.
        logits_NE = checkpoint_name(logits_NE, "router")
        routing = route(logits_NE, self.per_token, self.normalize)
        gate, up, down = (m.weight[...] for m in (self.gate, self.up, self.down))
        y_ND = experts(x_ND, routing, gate, up, down, self.form)
        y_BTD = checkpoint_name(y_ND, "down").reshape(x_BTD.shape)
        if weights_BT is None:
            return y_BTD, None
        return y_BTD, router_sums(logits_NE, routing, weights_BT.reshape(-1))
