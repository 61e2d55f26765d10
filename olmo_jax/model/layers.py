"""The parts of a block: projection, norm, attention, MLP.

Parameters are made with a leading layer axis (L, …) and used without it: the scan over layers, or
a decoder's loop, hands each call one layer's slice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.init import Initializer, input_std, output_std
from olmo_jax.model.rope import rotate
from olmo_jax.ops.attention import AttentionMask, attention
from olmo_jax.ops.attention_decode import attention_decode, write
from olmo_jax.ops.kernels import Kernels
from olmo_jax.ops.linear import linear, linear_of
from olmo_jax.parallel.sharding import constrain


def residual(x_BTD):
    """A sublayer's output, or the residual stream, where it lives on a mesh: cut along positions
    over `tensor` too, so that the sublayer's partial sums are added up and cut at once, the norms'
    work is shared, and the stream that each layer keeps for the backward pass is a part."""
    return constrain(x_BTD, "batch", "residual_time", None)


def projected(x_BTD):
    """A sublayer's input, whole along `tensor`: once here, not for each projection, and only after
    the norm and its cast, which the first of the two constraints keeps in place."""
    return constrain(residual(x_BTD), "batch", "time", None)


class Linear(nnx.Module):
    """y = x W + b, with W (in, out) and b only where the config has biases."""

    def __init__(self, init: Initializer, path, config: ModelConfig, kernels, shape, axes, std):
        layers = config.n_layers
        self.flat, self.axes = kernels.linear == "flat", axes
        self.name = path.rpartition(".")[2]  # what a remat policy calls the output
        self.weight = init.normal(f"{path}.weight", (layers, *shape), ("layer", *axes), std)
        self.bias = (
            init.constant((layers, shape[1]), ("layer", axes[1]), 0.0) if config.bias else None
        )

    def __call__(self, *parts, make=None):
        """Of one array, or of make(*parts), which is made again in the backward pass: only the
        parts are kept for it."""
        w = self.weight[...]
        if make is None:
            y = linear(*parts, w, self.axes, self.flat)
        else:
            y = linear_of(make, parts, w, self.axes, self.flat)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return checkpoint_name(y, self.name)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, in float32, returned in the input's type.

    The weight is multiplied in float32 before the cast, as OLMo-core does (OLMo casts first; in
    float32 the two agree).
    """

    def __init__(self, init: Initializer, config: ModelConfig, shape, axes):
        self.kind, self.eps = config.norm, config.norm_eps
        has_weight = config.norm != "layer_nonparametric"
        self.weight = init.constant(shape, axes, 1.0) if has_weight else None
        has_bias = config.norm == "layer" and config.bias
        self.bias = init.constant(shape, axes, 0.0) if has_bias else None

    def __call__(self, x):
        weight, bias = (None if a is None else a[...] for a in (self.weight, self.bias))
        return _normalised(x, weight, bias, self.kind != "rms", self.eps)


@partial(jax.checkpoint, static_argnums=(3, 4))
def _normalised(x, weight, bias, centred: bool, eps: float):
    """Made again in the backward pass: all that is kept is x, where three float32 arrays of its
    size would be (OLMo-2-1B: 12.9 GB of 38 at 2 x 4,096 tokens)."""
    y = x.astype(jnp.float32)
    if centred:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention with its four projections."""

    def __init__(self, init: Initializer, path: str, config: ModelConfig, kernels: Kernels):
        d, c = config.d_model, config.head_width
        heads, kv = config.n_heads * c, config.kv_heads * c
        std, out_std = input_std(config), output_std(config, d)

        def make(name, shape, axes, std):
            return Linear(init, f"{path}.{name}", config, kernels, shape, axes, std)

        self.q = make("q", (d, heads), ("embed", "heads"), std)
        self.k = make("k", (d, kv), ("embed", "kv_heads"), std)
        self.v = make("v", (d, kv), ("embed", "kv_heads"), std)
        self.out = make("out", (heads, d), ("heads", "embed"), out_std)

        def norm(width, axis):
            return Norm(init, config, (config.n_layers, width), ("layer", axis))

        self.q_norm = norm(heads, "heads") if config.qk_norm else None
        self.k_norm = norm(kv, "kv_heads") if config.qk_norm else None
        self.head_width, self.clip, self.kernels = c, config.clip_qkv, kernels

    def __call__(self, x_BTD, rope, mask: AttentionMask, cache=None):
        """Returns the output and the keys and values: as (B, S, K, C) without a cache; else T is 1,
        and they are the cache (a pair of (B, K, S, C)) with this call's written at the positions
        mask.offset, (B,). rope is None where nothing is rotated."""
        x_BTD = projected(x_BTD)
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        # A device's heads are its columns of the projections, as attention takes them.
        q = constrain(q, "batch", "time", "heads")
        k, v = (constrain(a, "batch", "time", "kv_heads") for a in (k, v))
        if self.clip is not None:
            q, k, v = (jnp.clip(a, -self.clip, self.clip) for a in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        B, T, _ = x_BTD.shape
        q_BTHC, k_BTKC, v_BTKC = (a.reshape(B, T, -1, self.head_width) for a in (q, k, v))
        if rope is not None:
            q_BTHC, k_BTKC = rotate(q_BTHC, rope), rotate(k_BTKC, rope)
        if cache is None:
            kv = k_BTKC, v_BTKC
            out_BTHC = attention(q_BTHC, k_BTKC, v_BTKC, mask, self.kernels)
        else:
            k_cache, v_cache = cache
            kv = (
                write(k_cache, k_BTKC[:, 0], mask.offset),
                write(v_cache, v_BTKC[:, 0], mask.offset),
            )
            out_BTHC = attention_decode(q_BTHC[:, 0], *kv, mask.offset, mask)[:, None]
        return self.out(out_BTHC.reshape(B, T, -1)), kv


class MLP(nnx.Module):
    """SwiGLU, or two projections with a GELU between."""

    def __init__(self, init: Initializer, path: str, config: ModelConfig, kernels: Kernels):
        d, f = config.d_model, config.mlp_width
        std, out_std = input_std(config), output_std(config, f)

        def make(name, shape, axes, std):
            return Linear(init, f"{path}.{name}", config, kernels, shape, axes, std)

        self.kind = config.mlp
        self.gate = make("gate", (d, f), ("embed", "mlp"), std) if self.kind == "swiglu" else None
        self.up = make("up", (d, f), ("embed", "mlp"), std)
        self.down = make("down", (f, d), ("mlp", "embed"), out_std)

    def __call__(self, x_BTD):
        x_BTD = projected(x_BTD)
        up_BTF = self.up(x_BTD)
        if self.gate is not None:
            return self.down(self.gate(x_BTD), up_BTF, make=_swiglu)
        return self.down(up_BTF, make=partial(_gelu, approximate=self.kind == "gelu_tanh"))


# A device keeps its part of the width from `up` to `down`.


def _swiglu(gate_BTF, up_BTF):
    return constrain(jax.nn.silu(gate_BTF) * up_BTF, "batch", "time", "mlp")


def _gelu(up_BTF, approximate: bool):
    return constrain(jax.nn.gelu(up_BTF, approximate=approximate), "batch", "time", "mlp")
