"""Meshes of several TPU slices: only the axis `slice` crosses the network between them."""

import numpy as np
import pytest
from programs import mesh_of

from olmo_jax.errors import UserError
from olmo_jax.parallel.mesh import AXES

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    ("target", "axes"),
    [
        ("2xv5e-16", {"fsdp": 16}),
        ("2xv5e-16", {"data": 2, "fsdp": 4, "tensor": 2}),
        ("2xv5p-32", {"fsdp": 4, "context": 4}),
        ("4xv6e-8", {"fsdp": 2, "expert": 4}),
    ],
)
def test_the_slice_axis_separates_the_slices(target, axes):
    slices = int(target[0])
    mesh = mesh_of(target, slice=slices, **axes)
    assert mesh.shape == dict.fromkeys(AXES, 1) | axes | {"slice": slices}
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for k in range(slices):
        assert np.all(index[k] == k), index
    assert len({device.id for device in mesh.devices.flat}) == mesh.size


def test_other_axes_do_not_cross_slices():
    with pytest.raises(UserError, match=r"in 2 slices: give Mesh.slice = 2"):
        mesh_of("2xv5e-16", slice=1, data=2, fsdp=16)
