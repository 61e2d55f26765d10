"""The device mesh: which axes there are, and how many devices each has."""

import math
from dataclasses import fields

import jax
from jax.sharding import AxisType, Mesh
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from olmo_jax.errors import UserError


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices. -1 takes the rest."""

    slice: int = 1
    """TPU slices (or hosts) joined by the data-centre network; the batch is split over it."""
    data: int = 1
    """Copies of the weights; the batch is split over it."""
    fsdp: int = -1
    """Shards of the weights and optimizer state; the batch is split over it too."""
    context: int = 1
    """Parts of each sequence; only 1 in this version."""
    tensor: int = 1
    """Parts of each head and MLP dimension."""
    expert: int = 1
    """Parts of the experts; only 1 in this version."""


def build_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh of all devices (jax.devices() where none are given) with the config's axes.

    UserError with the numbers where the axes' product is not the number of devices, and for axes
    that nothing uses yet.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {f.name: getattr(config, f.name) for f in fields(config)}
    given = ", ".join(f"{name}={n}" for name, n in sizes.items())
    free = [name for name, n in sizes.items() if n == -1]
    if len(free) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise UserError(f"mesh {given}: every axis is at least 1, and at most one is -1")
    if sizes["context"] != 1:  # all would do the same work
        raise UserError(f"Mesh.context = {sizes['context']}: this version takes 1 only")
    known = math.prod(n for n in sizes.values() if n != -1)
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh {given} needs a multiple of {known} devices, and there are {len(devices)}: "
            "give axes whose product is the number of devices, one of them -1 to take the rest"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(
        shape, tuple(sizes), devices=devices, axis_types=(AxisType.Auto,) * len(shape)
    )
