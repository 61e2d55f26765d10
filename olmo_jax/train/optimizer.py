"""The optimizer as optax transformations, gradient clipping's threshold, and SkipStep's rule.

The learning rate is no part of it: the step computes it on the host, in float64, and subtracts
learning_rate * update. Schedules are in `schedules`.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class OptimizerConfig:
    """The update rule. The defaults are OLMo 2's, with plain AdamW."""

    kind: Literal["adamw", "skip_step_adamw", "muon"] = "adamw"
    """AdamW; AdamW that leaves out steps whose loss or gradient norm is an outlier (OLMo-core, from
    OLMo 2's 32B on); or Muon for the hidden matrices and AdamW for everything else."""
    learning_rate: float = 3e-4
    """Peak learning rate; with Muon that of the matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's first and second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment (OLMo 1: 1e-5)."""
    weight_decay: float = 0.1
    """Decoupled weight decay: each step takes learning_rate * weight_decay * parameter off."""
    decay_norms: bool = True
    """Whether norms' weights and all biases decay (OLMo 1's 1B and 7B: no)."""
    decay_embeddings: bool = False
    """Whether the embedding table decays (OLMo 1 0424: yes); tied, it is the head as well."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None does not clip."""
    clip_warmup_factor: float | None = None
    """For the first steps clip at this many times clip_norm (OLMo 1 7B: 10, 0424: 5)."""
    clip_warmup_steps: int | None = None
    """How many steps (OLMo 1 7B: 1000), the last one included; give this or clip_warmup_tokens."""
    clip_warmup_tokens: int | None = None
    """How many tokens (0424: 2,097,152,000): steps that end at or before it."""
    skip_window: int = 128
    """skip_step_adamw: earlier steps whose losses and gradient norms are looked at."""
    skip_sigma: float = 6.0
    """skip_step_adamw: a step is left out above their mean + this many standard deviations."""
    muon_momentum: float = 0.95
    """Decay rate of Muon's momentum."""
    muon_nesterov: bool = True
    """Whether Muon looks one step ahead along its momentum."""
    muon_ns_steps: int = 5
    """Newton-Schulz iterations that make an update orthogonal."""
    adam_learning_rate_ratio: float = 0.5
    """Muon: the learning rate of embedding, head, norms and biases as a share of `learning_rate`
    (0.02 beside 0.04 in the prototype that the default comes from)."""

    @model_validator(mode="after")
    def _check(self):
        for name in ("learning_rate", "eps", "skip_sigma", "adam_learning_rate_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be above 0")
        for beta in (*self.betas, self.muon_momentum):
            if not 0 <= beta < 1:
                raise ValueError(f"betas or muon_momentum has {beta}: it must be in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay = {self.weight_decay}: it must be at least 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm = {self.clip_norm}: give a norm above 0, or None")
        if self.skip_window < 4:
            raise ValueError(f"skip_window = {self.skip_window}: it must be at least 4")
        if self.muon_ns_steps < 1:
            raise ValueError(f"muon_ns_steps = {self.muon_ns_steps}: it must be at least 1")
        spans = (self.clip_warmup_steps is not None) + (self.clip_warmup_tokens is not None)
        if spans != (self.clip_warmup_factor is not None):
            raise ValueError(
                "clip_warmup_factor needs exactly one of clip_warmup_steps and clip_warmup_tokens"
            )
        return self


# --- the update ---------------------------------------------------------------------------------


def build_optimizer(
    config: OptimizerConfig, params_abstract: Any
) -> optax.GradientTransformationExtraArgs:
    """The update rule for parameters of these shapes.

    `updates, state = tx.update(gradients, state, params, skip=skip)`, and the new parameter is
    parameter - learning_rate * update. `skip`, a boolean scalar array, makes every update 0 and
    leaves the state as it was, whatever the gradients hold (NaN too).

    Args:
        config: the optimizer.
        params_abstract: nested dict of arrays or ShapeDtypeStructs (float32); stacked layers have a
            leading layer axis.
    """
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask(config, params_abstract))
    adam = scale_by_adam(config.betas, config.eps)
    if config.kind != "muon":
        return optax.chain(adam, decay, zero_if_skipped())
    muon = scale_by_muon(
        ns_steps=config.muon_ns_steps,
        beta=config.muon_momentum,
        nesterov=config.muon_nesterov,
        weight_dimension_numbers=matrix_axes,
    )
    labels = jax.tree_util.tree_map_with_path(muon_or_adam, params_abstract)
    ratios = jax.tree.map(
        lambda label: config.adam_learning_rate_ratio if label == "adam" else 1.0, labels
    )
    return optax.chain(
        optax.partition(
            {
                "muon": optax.chain(skippable(muon), optax.stateless_with_tree_map(for_width)),
                "adam": adam,
            },
            labels,
        ),
        decay,
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, ratios)),
        zero_if_skipped(),
    )


def decay_mask(config: OptimizerConfig, params_abstract: Any) -> Any:
    """A tree of bools: which parameters weight decay takes from (OLMo's get_param_groups)."""

    def decays(path, _) -> bool:
        keys = [entry.key for entry in path]
        if is_norm_or_bias(keys):
            return config.decay_norms
        return config.decay_embeddings if "embed" in keys else True

    return jax.tree_util.tree_map_with_path(decays, params_abstract)


def is_norm_or_bias(keys: list[str]) -> bool:
    """Whether a parameter's dict keys name a norm's weight or any bias."""
    return keys[-1].endswith("bias") or any("norm" in key for key in keys)


def muon_or_adam(path, _) -> str:
    """Muon takes the hidden matrices; embedding, head, norms and biases stay with Adam."""
    keys = [entry.key for entry in path]
    other = is_norm_or_bias(keys) or "embed" in keys or "lm_head" in keys
    return "adam" if other else "muon"


def matrix_axes(updates: Any) -> Any:
    """Muon's axes: a weight is (…, in, out), and the leading axes (layer, expert) are a batch."""
    return jax.tree.map(lambda _: MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), updates)


def for_width(update, _):
    """Muon's update of a (…, in, out) weight times sqrt(max(1, out / in)), as its author's."""
    return update * math.sqrt(max(1.0, update.shape[-1] / update.shape[-2]))


def scale_by_adam(betas: tuple[float, float], eps: float) -> optax.GradientTransformationExtraArgs:
    """Adam with bias correction (Kingma & Ba 2015), eps outside the root, as torch.optim.AdamW.

    Not optax's own: its 1 - beta^n loses digits in float32 (5e-5 relative at beta 0.999), and it
    makes XLA:CPU copy both moments (680 MB and 0.28 s a step at 85M parameters, against no copy
    and 0.06 s here; torch's fused AdamW 0.045 s).
    """
    b1, b2 = betas

    def init(params):
        zeros = optax.tree.zeros_like
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(params), zeros(params))

    def update(gradients, state, params=None, *, skip=False, **_):
        del params
        count = state.count + jnp.where(skip, 0, 1)
        n = jnp.maximum(count, 1).astype(jnp.float32)
        # 1 - beta^n without the cancellation; beta = 0 needs no correction.
        correction1, correction2 = (
            -jnp.expm1(n * jnp.float32(math.log(b))) if b else jnp.float32(1) for b in betas
        )

        # Everything below reads the moments that are kept: were the update made of moments not yet
        # chosen by `skip`, the old ones would have to outlive it, in copies.
        def moments(g, m, v):
            m = jnp.where(skip, m, m + (1 - b1) * (g - m))
            v = jnp.where(skip, v, v + (1 - b2) * (g * g - v))
            return m, v

        pairs = jax.tree.map(moments, gradients, state.mu, state.nu)
        mu, nu = jax.tree.transpose(
            jax.tree.structure(gradients), jax.tree.structure((0, 0)), pairs
        )
        updates = jax.tree.map(
            lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + eps), mu, nu
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def zero_if_skipped() -> optax.GradientTransformationExtraArgs:
    """Makes every update 0 where `skip` is true."""

    def update(updates, state, params=None, *, skip=False, **_):
        del params
        return jax.tree.map(lambda u: jnp.where(skip, 0, u), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def skippable(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same transformation, its state left as it was where `skip` is true."""

    def update(updates, state, params=None, *, skip=False, **_):
        updates, new = transformation.update(updates, state, params)
        return updates, jax.tree.map(lambda old, new: jnp.where(skip, old, new), state, new)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


# --- clipping -----------------------------------------------------------------------------------


def clip_threshold(config: OptimizerConfig, step: int, tokens: int) -> float:
    """The global norm that gradients are clipped to in one step; inf where clipping is off.

    Args:
        config: the optimizer.
        step: number of this step, counted from 1.
        tokens: tokens seen when this step is done. Both as in `schedules.learning_rate`, and as
            OLMo counts: a step at which the count equals the warm-up still has the wide threshold.
    """
    if config.clip_norm is None:
        return math.inf
    if config.clip_warmup_factor is None:
        return config.clip_norm
    if config.clip_warmup_steps is not None:
        warming_up = step <= config.clip_warmup_steps
    else:
        assert config.clip_warmup_tokens is not None
        warming_up = tokens <= config.clip_warmup_tokens
    return config.clip_norm * (config.clip_warmup_factor if warming_up else 1.0)


def clip_scale(grad_norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """The factor on all gradients; 1e-6 beside the norm as in torch's clip_grad_norm_ and OLMo."""
    return jnp.minimum(1.0, threshold / (grad_norm + 1e-6))


# --- leaving steps out --------------------------------------------------------------------------


class SkipState(NamedTuple):
    """The last losses and gradient norms, each a ring of `skip_window` (W) float32 entries."""

    losses_W: jax.Array
    grad_norms_W: jax.Array
    seen: jax.Array
    """int32 scalar: steps with a finite loss and gradient norm so far."""

    @classmethod
    def empty(cls, config: OptimizerConfig) -> "SkipState":
        """The state before the first step. Every kind of optimizer keeps one."""
        return cls(
            jnp.zeros(config.skip_window, jnp.float32),
            jnp.zeros(config.skip_window, jnp.float32),
            jnp.zeros([], jnp.int32),
        )


def skip_step(
    config: OptimizerConfig, state: SkipState, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, SkipState]:
    """Whether to leave this step out (bool scalar array), and the window with it added.

    A loss or gradient norm that is not finite: always left out, for every kind, and never added.
    "skip_step_adamw" also leaves out a step whose loss or gradient norm (before clipping) is over
    mean + skip_sigma * deviation (unbiased) of the earlier ones in the window, from the time that
    there are skip_window / 2 including this one; an outlier is added all the same. From OLMo-core's
    SkipStepOptimizer, where a NaN enters the window and everything after it is left out.
    """
    loss, grad_norm = loss.astype(jnp.float32), grad_norm.astype(jnp.float32)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    window = config.skip_window
    filled = jnp.arange(window) < state.seen

    def outlier(value, earlier_W):
        n = jnp.sum(filled)
        mean = jnp.sum(earlier_W, where=filled) / n
        variance = jnp.sum(jnp.square(earlier_W - mean), where=filled) / (n - 1)
        return value - mean > config.skip_sigma * jnp.sqrt(variance)

    skip = ~finite
    if config.kind == "skip_step_adamw":
        active = state.seen + 1 >= window // 2
        outlying = outlier(loss, state.losses_W) | outlier(grad_norm, state.grad_norms_W)
        skip = skip | (active & outlying)

    here = (jnp.arange(window) == state.seen % window) & finite
    return skip, SkipState(
        jnp.where(here, loss, state.losses_W),
        jnp.where(here, grad_norm, state.grad_norms_W),
        state.seen + finite,
    )
