"""Where each logical axis lives on the mesh. Only this file knows that "embed" is on fsdp.

Weights are cut over fsdp along the residual width and over tensor along heads, MLP and vocabulary;
a batch's rows are spread over slice, data and fsdp. An axis that a dimension does not divide by is
dropped for that dimension (the weight is then whole along it).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("slice", "data", "fsdp")


@dataclass(frozen=True)
class Rules:
    """Mesh axis of each logical axis; None is whole on every device."""

    layer: str | None = None
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    expert: str | None = "expert"


def weight_sharding(
    mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...], rules: Rules | None = None
) -> NamedSharding:
    """The sharding of a weight with these logical axis names and this shape."""
    rules = rules or Rules()
    names = [getattr(rules, axis) for axis in axes]
    spec = [
        name if name and size % mesh.shape[name] == 0 else None
        for name, size in zip(names, shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows spread over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


@lru_cache
def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """The rows of a batch of `size` that this process's devices hold, rising; the same ones as
    another process's where an axis that does not cut the batch runs over both."""
    spans = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in spans if index]))


def to_global(mesh: Mesh, rows: Any, size: int | None = None) -> Any:
    """A pytree of rows (numpy, leading axis the batch) as global arrays of `size` rows.

    The rows are those of `local_rows(mesh, size)`; without a size they are the whole batch, the
    same one in every process.
    """
    sharding = batch_sharding(mesh)
    here = None if size is None else local_rows(mesh, size)

    def place(a: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            if here is None:
                return a[index]
            start, stop, _ = index[0].indices(size or 0)
            first, end = np.searchsorted(here, (start, stop))
            return a[(slice(first, end), *index[1:])]

        shape = (len(a) if size is None else size, *a.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, rows)
