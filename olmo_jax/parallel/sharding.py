"""Where each logical axis lives on the mesh. Only this file knows that "embed" is on fsdp."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from olmo_jax.parallel.mesh import current_mesh


@dataclass(frozen=True)
class Rules:
    """The mesh axes that each logical axis is cut over; an empty one is whole on every device.

    Weights and the optimizer's moments, float32: cut twice. Along heads, MLP or vocabulary over
    `tensor` (Megatron: each device keeps its part and adds its part of the result); along the
    residual width ("embed") over `fsdp`, and over `context` and `expert` too, since devices along
    those hold the same weights otherwise (ZeRO-3: the part is gathered, in the compute type, just
    before its use, and gradients are added up and cut again, in float32, just after). Experts are
    cut over `expert` first, so each is whole on one device along it. Devices along `slice` and
    `data` hold copies: between slices only gradients travel.

    Activations: the batch's rows are cut over every axis but `context` and `tensor`; positions of
    a sequence over `context`; between the sublayers, where nothing mixes positions, over `tensor`
    too (sequence parallelism: the residual stream that is kept for the backward pass, and the
    norms' work, are not repeated along it). Heads and MLP width are cut over `tensor`.

    An axis that a dimension does not divide by, or that an earlier dimension of the same array
    uses, is left out for that dimension.
    """

    layer: tuple[str, ...] = ()
    embed: tuple[str, ...] = ("fsdp", "context", "expert")
    norm: tuple[str, ...] = ()  # a few kB: gathering them costs more than it saves
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)
    router: tuple[str, ...] = ()  # every device routes its own tokens to all experts

    batch: tuple[str, ...] = ("slice", "data", "fsdp", "expert")
    time: tuple[str, ...] = ("context",)
    residual_time: tuple[str, ...] = ("context", "tensor")


RULES = Rules()
BATCH_AXES = RULES.batch


def cuts(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]
) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that cut each dimension of an array with these logical axes (None: whole)."""
    found: list[tuple[str, ...]] = []
    used: set[str] = set()
    for name, size in zip(axes, shape, strict=True):
        taken: list[str] = []
        parts = 1
        for axis in getattr(RULES, name) if name else ():
            n = mesh.shape[axis]
            if n > 1 and axis not in used and size % (parts * n) == 0:
                taken.append(axis)
                parts *= n
        used |= set(taken)
        found.append(tuple(taken))
    return tuple(found)


def weight_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a weight with these logical axis names and this shape."""
    return NamedSharding(mesh, PartitionSpec(*cuts(mesh, axes, shape)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, cut as the logical axes of its dimensions say; x itself outside `on_mesh`."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*cuts(mesh, axes, x.shape)))


def gathered(w: jax.Array, axes: Sequence[str]) -> jax.Array:
    """A weight in the compute type, whole along "embed" and still cut along its other axes.

    The first constraint keeps the cast before the gather, so that half the bytes travel.
    """
    w = constrain(w, *axes)
    return constrain(w, *(None if axis == "embed" else axis for axis in axes))


def axis_size(name: str) -> int:
    """Devices along a mesh axis, 1 outside `on_mesh`."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[name]


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows spread over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def to_global(mesh: Mesh, local: Any) -> Any:
    """A pytree of this process's rows (numpy, leading axis the batch) as global arrays."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), local)


def zigzag(T: int, parts: int) -> np.ndarray:
    """The order of positions in which device i of `parts` holds the chunks i and 2 parts - 1 - i.

    Of 2 · parts chunks; under a causal mask every device then sees as much as every other.
    """
    chunks = np.arange(T).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, -1 - i]].reshape(-1) for i in range(parts)])
