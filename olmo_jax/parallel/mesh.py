"""The device mesh: which axes there are, how many devices each has, and which mesh is in use.

What lives where on it is sharding.py's.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from olmo_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "context", "tensor", "expert")


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
    """Parts of each sequence, and shards of the weights. Under a causal mask each device has an
    early and a late part, so that all have the same work; twice this number divides the length."""
    tensor: int = 1
    """Parts of the heads, of each MLP and of the vocabulary."""
    expert: int = 1
    """Parts of the experts; the batch is split over it, and the other weights too."""
    context_form: Literal["gathered", "ring"] = "gathered"
    """How keys and values meet the queries of other parts of a sequence: all of them gathered on
    every device of `context` (few large messages), or passed on from one to the next (memory of
    one part only, sent while the last one is worked on). Layers with a window that fits in half a
    part exchange only what the window reaches."""


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices (jax.devices() where none are given) with the config's axes.

    UserError with the numbers where the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in AXES}
    given = ", ".join(f"{name}={n}" for name, n in sizes.items())
    free = [name for name, n in sizes.items() if n == -1]
    if len(free) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise UserError(f"mesh {given}: every axis is at least 1, and at most one is -1")
    known = math.prod(n for n in sizes.values() if n != -1)
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh {given} needs a multiple of {known} devices, and there are {len(devices)}: "
            "give axes whose product is the number of devices, one of them -1 to take the rest"
        )
    return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the mesh's shape, neighbours along the last axes close in the network."""
    shape = tuple(sizes.values())
    # jax calls each host of a GPU cluster a slice too. There any axis may go from host to host, and
    # the devices' own order has each host's together.
    is_tpu = devices[0].platform == "tpu"
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if is_tpu else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["slice"] != slices:
        raise UserError(
            f"Mesh.slice = {sizes['slice']}, and the devices are in {slices} slices: give "
            f"Mesh.slice = {slices}, so that the other axes stay within a slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]),
        (slices, *(1,) * (len(shape) - 1)),
        devices,
        allow_split_physical_axes=True,
    )


@contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside a jitted function: what is traced in this scope is laid out on this mesh.

    It is the one way in which the mesh reaches the operations; without it (generation, conversion,
    a model in a notebook) they run as on one device. Where `context` is more than 1, the
    positions of a sequence are expected in the order of `sharding.zigzag`.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def current_mesh() -> AbstractMesh | None:
    """The mesh of the `on_mesh` around, None where there is none or it is a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh
