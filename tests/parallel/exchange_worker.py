"""Experts cut over eight virtual devices against the same ones on one; see test_mesh.py.

Balanced routing, and all tokens of all devices to the experts of one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from mesh_worker import parse  # which gives jax.lax a ragged exchange

from olmo_jax.ops.experts import mixture
from olmo_jax.parallel.mesh import build_mesh, on_mesh
from olmo_jax.parallel.sharding import replicated

B, T, D, F, E, A = 8, 6, 10, 4, 16, 3


def gradients(mesh_text: str, exchange: str, cases):
    """Of each case the output, and the gradients of a bent sum of it."""
    config = parse(mesh_text)
    mesh = build_mesh(config, jax.devices()[: config.expert * config.fsdp])

    def total(x_BTD, logits_BTE, *matrices):
        forms = "reference", exchange
        y_BTD, _ = mixture(x_BTD, logits_BTE, None, *matrices, A, False, forms)
        return jnp.sum(jnp.sin(y_BTD + jnp.arange(T)[:, None])), y_BTD

    @jax.jit
    def run(*inputs):
        with on_mesh(mesh):
            return jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True)(*inputs)

    return [jax.device_get(run(*jax.device_put(case, replicated(mesh)))) for case in cases]


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (B, T, D), (B, T, E), (E, D, F), (E, D, F), (E, F, D)
    x, logits, *matrices = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    matrices = [0.3 * a for a in matrices]
    one_sided = [logits.at[:, :, favoured].add(100) for favoured in (slice(0, A), slice(E - A, E))]
    cases = [(x, routing, *matrices) for routing in (logits, *one_sided)]
    want = gradients("fsdp=1", "padded", cases)
    # More devices than a token visits, and fewer.
    for mesh, form in (("expert=8", "padded"), ("expert=8", "ragged"), ("expert=2", "ragged")):
        found = gradients(mesh, form, cases)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            error = np.linalg.norm(a - b) / max(1, np.linalg.norm(b))
            assert error < 1e-5, (mesh, form, error)
