"""Log-likelihoods of continuations: packed rows, shared beginnings computed once, few programs.

What the requests are, and what becomes of their scores, is tasks.py's and metrics.py's.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from olmo_jax.errors import UserError
from olmo_jax.eval import packing
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, bind, parameter_axes, parameters
from olmo_jax.parallel.mesh import AXES, MeshConfig, build_mesh, on_mesh
from olmo_jax.parallel.sharding import (
    batch_parts,
    constrain,
    gathered,
    to_global,
    weight_sharding,
)

_HEAD_TOKENS = 256  # positions of a batch whose logits exist at once


class Pair(NamedTuple):
    """A context and what follows it, as token ids; both have at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """Of a continuation, given its context."""

    logprob: float
    """Sum over its tokens of the natural log of their probability."""
    is_greedy: bool
    """Whether each token is the likeliest one at its place."""
    logprobs: np.ndarray
    """Of each token, float32."""


class Scorer:
    """Scores pairs with a model; `scorer.model` may be replaced by another of its architecture.

    mesh: the one that the model's weights are cut over; every process calls with the same pairs and
    gets every score. max_length: tokens that the model reads at once, its context where not given;
    a longer context loses its beginning. tokens_per_batch: over all devices; it changes speed only.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        mesh: Mesh | None = None,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
    ):
        if mesh is None:  # a loaded model's weights may still be the host's
            model = bind(model, jax.device_put(parameters(model)))
        self.model, self.mesh = model, None if mesh is None else _rows_only(mesh)
        self.max_length = max_length or model.config.context_length
        if tokens_per_batch is None:
            device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
            each = 2048 if device.platform == "cpu" else 16384
            tokens_per_batch = each * (1 if mesh is None else batch_parts(self.mesh or mesh))
        self.tokens_per_batch = tokens_per_batch

    @classmethod
    def on_all_devices(cls, model: Transformer) -> "Scorer":
        """A scorer whose weights are cut over all devices of this process, if there are several."""
        if jax.local_device_count() == 1:
            return cls(model)
        mesh = build_mesh(MeshConfig(), jax.local_devices())
        cut = jax.tree.map(
            lambda a, axes: jax.device_put(a, weight_sharding(mesh, axes, a.shape)),
            parameters(model),
            parameter_axes(model),
        )
        return cls(bind(model, cut), mesh=mesh)

    def __call__(
        self,
        pairs: Sequence[Pair],
        progress: Callable[[int, int], None] | None = None,
        done: Collection[int] = (),
    ) -> Iterator[tuple[int, Score]]:
        """Yields (index into pairs, score) of each, in the order in which they are done.

        progress is called after each batch with (pairs done, of how many); the next batch is under
        way by then. A batch all of whose pairs are in `done` (of an earlier call that was stopped)
        is left out, and the others are the same, to the last bit. Raises UserError for what cannot
        be scored.
        """
        requests = [self._request(i, pair) for i, pair in enumerate(pairs)]
        return self._scores(requests, progress, frozenset(done))

    def _request(self, i: int, pair: Pair) -> packing.Request:
        context, continuation = pair
        if not context or not continuation:
            raise UserError(
                f"request {i}: its {'continuation' if context else 'context'} has no tokens: give "
                "at least one (a beginning- or end-of-text token begins an empty context)"
            )
        if len(continuation) > self.max_length:
            raise UserError(
                f"request {i}: a continuation of {len(continuation)} tokens exceeds the model's "
                f"{self.max_length}: leave it out, or give a model with a longer context"
            )
        tokens = np.asarray((*context, *continuation)[-self.max_length - 1 :], np.int64)
        if tokens.min() < 0 or tokens.max() >= self.model.config.rows:
            raise UserError(
                f"request {i}: an id is outside the model's vocabulary of {self.model.config.rows}"
            )
        return packing.Request(tokens.astype(np.int32), len(continuation))

    def _scores(self, requests, progress, known) -> Iterator[tuple[int, Score]]:
        parts = 1 if self.mesh is None else batch_parts(self.mesh)
        planned = packing.batches(
            requests, self.tokens_per_batch, parts, _parity_length(self.model.config)
        )
        waiting, done = None, 0
        for batch in itertools.chain(planned, [None]) if requests else ():
            if batch is not None and known.issuperset(i for i, *_ in batch.requests):
                done += len(batch.requests)
                continue
            running = None if batch is None else (batch, self._run(batch))
            if waiting is not None:
                batch, found = waiting
                logprobs_BPK, likeliest_BPK = (np.asarray(a) for a in found)
                for i, row, slots, ks in batch.requests:
                    logprobs = logprobs_BPK[row, slots, ks]
                    greedy = bool(likeliest_BPK[row, slots, ks].all())
                    yield i, Score(float(logprobs.sum(dtype=np.float64)), greedy, logprobs)
                done += len(batch.requests)
                if progress:
                    progress(done, len(requests))
            waiting = running

    def _run(self, batch: packing.Batch) -> tuple[jax.Array, jax.Array]:
        size = max(1, _HEAD_TOKENS // len(batch.tokens_BT))
        arrays = batch[:5]
        if self.mesh is not None:
            arrays = to_global(self.mesh, arrays)
        return _score(self.model, *arrays, np.int32(-(-batch.n_scored // size)), self.mesh, size)


def _parity_length(config: ModelConfig) -> float:
    """The row length at which attention costs as much as the products with weights.

    A third of what FLOPs say (12 d). At d 512 on a CPU a token of a row of 512 cost no more than
    one of 128 or 256 (within 6%), so it may be longer still.
    """
    return 4.0 * config.d_model


def _rows_only(mesh: Mesh) -> Mesh:
    """The same devices, those along `context` as more of `fsdp`: weights lie as they did, and a row
    is whole on a device. (Trees are not cut: a branch may see what lies far before it.)"""
    shape = dict(mesh.shape)
    shape["fsdp"] *= shape["context"]
    shape["context"] = 1
    devices = mesh.devices.reshape([shape[axis] for axis in AXES])
    return Mesh(devices, AXES, axis_types=mesh.axis_types)


@partial(jax.jit, static_argnames=("mesh", "size"))
def _score(
    model: Transformer,
    tokens_BT,
    positions_BT,
    last_reader_BT,
    scored_BP,
    targets_BPK,
    n_chunks,
    mesh: Mesh | None,
    size: int,
):
    """Log-probabilities of the targets and whether each is the likeliest token, (B, P, K); only
    the first n_chunks · size of P are computed."""
    with nullcontext() if mesh is None else on_mesh(mesh):
        x_BTD = model.hidden(tokens_BT, None, positions_BT, last_reader_BT)
        P = scored_BP.shape[1]
        padding = ((0, 0), (0, -P % size))
        x_BPD = jnp.take_along_axis(x_BTD, jnp.pad(scored_BP, padding)[:, :, None], axis=1)
        x_BPD = constrain(x_BPD, "batch", None, None)
        targets_BPK = jnp.pad(targets_BPK, (*padding, (0, 0)))
        head_DV = gathered(model.head_DV().astype(x_BPD.dtype), ("embed", "vocab"))

        def chunk(n, found):
            x = lax.dynamic_slice_in_dim(x_BPD, n * size, size, axis=1)
            targets = lax.dynamic_slice_in_dim(targets_BPK, n * size, size, axis=1)
            logits = jnp.dot(x, head_DV, preferred_element_type=jnp.float32)
            logits = constrain(logits, "batch", None, "vocab")
            largest = jnp.max(logits, axis=-1, keepdims=True)
            total = jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)
            own = jnp.take_along_axis(logits, targets, axis=-1)
            new = own - largest - jnp.log(total), own >= largest
            return tuple(
                lax.dynamic_update_slice_in_dim(a, b, n * size, axis=1)
                for a, b in zip(found, new, strict=True)
            )

        shape = targets_BPK.shape
        empty = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.bool_)
        found = lax.fori_loop(0, n_chunks, chunk, empty)
        return tuple(constrain(a, None, None, None) for a in found)  # every process reads them
