"""Experts cut over eight virtual devices against the same ones on one; see test_mesh.py.

Balanced routing, and all tokens of all devices to the experts of one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from mesh_worker import parse  # which gives jax.lax a ragged exchange

from olmo_jax.ops.experts import mixture
from olmo_jax.parallel.mesh import build_mesh, on_mesh

B, T, D, F, E, A = 8, 6, 10, 4, 16, 3


def gradients(mesh, exchange, x_BTD, logits_BTE, *matrices):
    """The output, and the gradients of a bent sum of it."""

    def total(x_BTD, logits_BTE, *matrices):
        forms = "reference", exchange
        y_BTD, _ = mixture(x_BTD, logits_BTE, None, *matrices, A, False, forms)
        return jnp.sum(jnp.sin(y_BTD + jnp.arange(T)[:, None])), y_BTD

    @jax.jit
    def run(*inputs):
        with on_mesh(mesh):
            return jax.value_and_grad(total, argnums=range(5), has_aux=True)(*inputs)

    (_, y_BTD), found = run(x_BTD, logits_BTE, *matrices)
    return jax.device_get((y_BTD, found))


def check(mesh_text: str, exchange: str) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (B, T, D), (B, T, E), (E, D, F), (E, D, F), (E, F, D)
    inputs = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    mesh = build_mesh(parse(mesh_text), jax.devices())
    one = build_mesh(parse("fsdp=1"), jax.devices()[:1])
    for favoured in (None, slice(0, A), slice(E - A, E)):
        if favoured is not None:
            inputs[1] = inputs[1].at[:, :, favoured].add(100)
        want = gradients(one, exchange, *inputs)
        found = gradients(mesh, exchange, *inputs)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * max(1, np.linalg.norm(b)), (mesh_text, exchange)
        inputs[1] = jax.random.normal(keys[1], shapes[1])
    print("same", mesh_text, exchange)


if __name__ == "__main__":
    for mesh in ("expert=8", "expert=2,fsdp=4"):  # more devices than a token visits, and fewer
        for form in ("padded", "ragged"):
            check(mesh, form)
