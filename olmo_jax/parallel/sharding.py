"""Where each logical axis lives on the mesh. Only this file knows that "embed" is on fsdp.

Weights are cut over fsdp along the residual width and over tensor along heads, MLP and vocabulary;
a batch's rows are spread over slice, data and fsdp. An axis that a dimension does not divide by is
dropped for that dimension (the weight is then whole along it).
"""

from dataclasses import dataclass
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


def to_global(mesh: Mesh, local: Any) -> Any:
    """A pytree of this process's rows (numpy, leading axis the batch) as global arrays."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), local)
