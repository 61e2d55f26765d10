"""The training step: a pure function of (state, batch, learning rate), jitted once a batch shape.

It knows nothing of files, clocks or the loop around it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from olmo_jax.data.batch import Batch
from olmo_jax.model.transformer import Transformer, bind, parameter_axes, parameters
from olmo_jax.ops.cross_entropy import cross_entropy
from olmo_jax.ops.experts import RouterSums, load_balancing_loss, router_z_loss
from olmo_jax.parallel.mesh import on_mesh
from olmo_jax.parallel.sharding import (
    axis_size,
    batch_sharding,
    constrain,
    replicated,
    weight_sharding,
    zigzag,
)
from olmo_jax.train.optimizer import (
    OptimizerConfig,
    SkipState,
    build_optimizer,
    clip_scale,
    skip_step,
)


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array
    """int32, steps finished."""
    params: dict
    """float32 weights, as `model.transformer.parameters`."""
    opt_state: Any
    """optax's."""
    skip: SkipState
    """The window of losses and gradient norms that SkipStep looks at."""


class Losses(NamedTuple):
    """Weighted sums over tokens; those of a batch's parts add up to the batch's."""

    loss: jax.Array
    """Cross-entropy alone, float32 scalar."""
    z_loss: jax.Array
    """log(Z)² times its weight."""
    router: RouterSums | None
    """Of every layer, where there are experts."""


def laid_out(batch: Batch) -> Batch:
    """The batch as the devices of the mesh in use (`on_mesh`) take it: each its part of every row.

    Tokens move to the zigzag order, and with them, the shift being done, their targets, mask,
    documents and true positions; of a loss, a sum over tokens, nothing changes. Row numbers stay.
    """
    parts, T = axis_size("context"), batch.tokens_BT.shape[1]
    if parts > 1:
        order = zigzag(T, parts)
        positions_BT = batch.positions_BT
        if positions_BT is None:
            positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), batch.tokens_BT.shape)
        batch = batch._replace(positions_BT=positions_BT)
        batch = jax.tree.map(lambda a: jnp.take(a, order, axis=1), batch)
    return jax.tree.map(lambda a: constrain(a, "batch", "time"), batch)


def loss_function(
    model: Transformer,
    batch: Batch,
    weights_BT: jax.Array | np.ndarray,
    z_loss: float,
    load_LE: jax.Array | None = None,
) -> tuple[jax.Array, Losses]:
    """What is minimised, and its parts. Only the first carries gradients.

    The router's losses are means over the same tokens as the cross-entropy, so padding and filtered
    instances count in neither. load_LE is the experts' load over the global batch where `batch` is
    a part of it.
    """
    x_BTD, sums = model.hidden_and_routing(
        batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, weights_BT
    )
    total, parts = cross_entropy(
        x_BTD,
        model.head_DV(),
        batch.targets_BT,
        weights_BT,
        z_loss,
        model.kernels.cross_entropy_tokens,
    )
    if sums is not None:
        load_LE = sums.load_E if load_LE is None else load_LE
        balance = load_balancing_loss(load_LE, sums.probability_E)
        total += model.config.load_balancing_loss * balance
        total += model.config.router_z_loss * router_z_loss(sums.z)
    return total, Losses(*parts, sums)


class Trainer:
    """The step and the states that it takes, for one model, optimizer and mesh.

    `model` is abstract (shapes only); nothing is allocated until `init_state`.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        z_loss: float = 0.0,
        micro_batch_size: int | None = None,
    ):
        self.model, self.mesh = model, mesh
        self.optimizer, self.z_loss, self.micro_batch_size = optimizer, z_loss, micro_batch_size
        self.transform = build_optimizer(optimizer, parameters(model))
        shapes = jax.eval_shape(self._state, parameters(model))
        self.shardings = self._shardings(shapes)
        self.abstract_state: TrainState = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, self.shardings
        )
        scalar = replicated(mesh)
        self.step: Callable[..., tuple[TrainState, dict[str, jax.Array]]] = jax.jit(
            self._step,
            donate_argnums=0,
            in_shardings=(self.shardings, batch_sharding(mesh), scalar, scalar),
            out_shardings=(self.shardings, scalar),
        )

    def init_state(self, make_params: Callable[[], dict] | dict) -> TrainState:
        """The state before the first step, each device making its own part.

        Takes a pure function that makes the weights, or the weights themselves.
        """
        if callable(make_params):
            make = make_params
            return jax.jit(lambda: self._state(make()), out_shardings=self.shardings)()
        params = jax.device_put(make_params, self.shardings.params)
        return jax.jit(self._state, out_shardings=self.shardings)(params)

    def empty_skip_state(self) -> SkipState:
        """SkipStep's window before the first step."""
        return jax.device_put(SkipState.empty(self.optimizer), self.shardings.skip)

    def _state(self, params: dict) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.transform.init(params),
            skip=SkipState.empty(self.optimizer),
        )

    def _shardings(self, shapes: TrainState) -> Any:
        """Weights by their logical axes; each of the optimizer's arrays as the weight it is for."""
        axes = parameter_axes(self.model)
        params = jax.tree.map(
            lambda p, a: weight_sharding(self.mesh, a, p.shape),
            shapes.params,
            axes,
            is_leaf=lambda a: isinstance(a, tuple),
        )
        whole: Any = replicated(self.mesh)
        by_path = {_keys(path): s for path, s in jax.tree.leaves_with_path(params)}

        def for_optimizer(path, _):
            keys = _keys(path)  # the path of a moment ends with that of its weight
            tails = (keys[i:] for i in range(len(keys)))
            return next((by_path[tail] for tail in tails if tail in by_path), whole)

        opt_state = jax.tree.map_with_path(for_optimizer, shapes.opt_state)
        return TrainState(
            step=whole,
            params=params,
            opt_state=opt_state,
            skip=jax.tree.map(lambda _: whole, shapes.skip),
        )

    def _step(
        self, state: TrainState, batch: Batch, learning_rate: jax.Array, clip_norm: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step.

        learning_rate and clip_norm (inf: no clipping) are float32 scalars that the host computed in
        float64. Metrics: loss (cross-entropy alone), z_loss, grad_norm (before clipping), skipped,
        and where there are experts `router_metrics`.
        A step that is skipped, or whose loss or gradient norm is not finite, leaves parameters and
        optimizer state as they were.
        """
        with on_mesh(self.mesh):
            (loss, z_loss, router), grads = self._gradients(state.params, laid_out(batch))
        grad_norm = optax.global_norm(grads)
        skip, skip_state = skip_step(self.optimizer, state.skip, loss, grad_norm)
        scale = clip_scale(grad_norm, clip_norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = self.transform.update(grads, state.opt_state, state.params, skip=skip)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        new_state = TrainState(state.step + 1, params, opt_state, skip_state)
        metrics = {"loss": loss, "z_loss": z_loss, "grad_norm": grad_norm, "skipped": skip}
        if router is not None:
            metrics |= router_metrics(router)
        return new_state, metrics

    def _gradients(self, params: dict, batch: Batch) -> tuple[Losses, dict]:
        """Losses and gradients of the global mean, micro-batch by micro-batch."""
        denominator = jnp.maximum(jnp.sum(batch.loss_mask_BT, dtype=jnp.float32), 1.0)

        def weights(batch: Batch):
            return batch.loss_mask_BT.astype(jnp.float32) / denominator

        def micro(batch: Batch, load_LE=None):
            def total(params):
                model = bind(self.model, params)
                return loss_function(model, batch, weights(batch), self.z_loss, load_LE)

            (_, losses), grads = jax.value_and_grad(total, has_aux=True)(params)
            return losses, grads

        rows = batch.tokens_BT.shape[0]
        n_micro = rows // (self.micro_batch_size or rows)
        if n_micro <= 1:
            return micro(batch)
        # Micro-batch i takes rows i, i + n, …: every device has its share of each.
        split = jax.tree.map(
            lambda a: constrain(
                a.reshape(-1, n_micro, *a.shape[1:]).swapaxes(0, 1), None, "batch", "time"
            ),
            batch,
        )

        load_LE = None
        if self.model.config.load_balancing_loss and self.model.config.n_experts:
            # A product of two means over the global batch: one of them has to be known before the
            # first gradient, which takes a forward pass over all of it (without the head).
            def load(batch):
                model = bind(self.model, params)
                inputs = batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
                _, sums = model.hidden_and_routing(*inputs, weights(batch))
                assert sums is not None
                return sums.load_E

            load_LE = jnp.sum(jax.lax.map(load, split), axis=0)

        def add(sums, batch):
            return jax.tree.map(jnp.add, sums, micro(batch, load_LE)), None

        first = jax.tree.map(lambda a: a[0], split)
        shapes = jax.eval_shape(micro, first, load_LE)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (losses, grads), _ = jax.lax.scan(add, zeros, split)
        return losses, grads


def router_metrics(router: RouterSums) -> dict[str, jax.Array]:
    """load_balancing_loss and router_z_loss, both without their weights, and the load of the
    fullest and of the emptiest expert of any layer, as multiples of the mean (1 is balance)."""
    load_LE = router.load_E / jnp.mean(router.load_E, axis=1, keepdims=True)
    return {
        "load_balancing_loss": load_balancing_loss(router.load_E, router.probability_E),
        "router_z_loss": router_z_loss(router.z),
        "expert_load_max": jnp.max(load_LE),
        "expert_load_min": jnp.min(load_LE),
    }


def _keys(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
