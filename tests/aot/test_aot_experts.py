"""Experts over the expert axis, compiled: tokens travel by the ragged exchange."""

import re

import jax
import jax.numpy as jnp
import pytest
from programs import array, compiled, mesh_of

from olmo_jax.ops.experts import mixture
from olmo_jax.ops.kernels import pick_kernels
from olmo_jax.parallel.mesh import on_mesh
from olmo_jax.parallel.sharding import cuts

pytestmark = pytest.mark.aot
B, T, D, F, E, A = 8, 4096, 2048, 1024, 64, 8  # OLMoE's


def layer(target: str, **axes: int) -> tuple[str, int]:
    """The gradient of a layer's experts on a row a device: its program and temporaries."""
    mesh = mesh_of(target, **axes)
    device = mesh.devices.flat[0]
    kernels = pick_kernels(device.platform, device.device_kind)

    def total(x_BTD, logits_BTE, *matrices):
        with on_mesh(mesh):
            forms = kernels.experts, kernels.exchange
            y_BTD, _ = mixture(x_BTD, logits_BTE, None, *matrices, A, False, forms)
        return jnp.sum(jnp.square(y_BTD.astype(jnp.float32)))

    def shape(sizes, dtype, *names):
        return array(mesh, sizes, dtype, *cuts(mesh, names, sizes))

    x = shape((B, T, D), jnp.bfloat16, "batch", "residual_time", None)
    logits = shape((B, T, E), jnp.float32, "batch", "residual_time", None)
    into = shape((E, D, F), jnp.float32, "expert", "embed", "mlp")
    out_of = shape((E, F, D), jnp.float32, "expert", "mlp", "embed")
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)))
    return compiled(gradient, x, logits, into, into, out_of)


@pytest.mark.parametrize("target", ["v5p-16", "h100-8"])
def test_tokens_travel_by_the_ragged_exchange(target):
    text, temporaries = layer(target, expert=4, fsdp=2)
    print(f"{target}: {temporaries / 1e9:.2f} GB of temporaries")
    found = re.findall(r" = \(*(\w+)\[.* ragged-all-to-all(?:-start)?\(", text)
    # Tokens there, sums back; their gradients the other way.
    assert found.count("bf16") == 4, found
