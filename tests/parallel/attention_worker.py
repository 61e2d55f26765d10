"""Attention of sequences cut over eight devices, against the reference on whole ones."""

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.ops.attention import AttentionMask, alibi_slopes, attention
from olmo_jax.ops.kernels import Kernels
from olmo_jax.parallel.mesh import MeshConfig, build_mesh, on_mesh
from olmo_jax.parallel.sharding import zigzag

B, T, H, C = 2, 64, 4, 8


def check(mesh, form, window=0, K=2, segmented=True, alibi=False):
    """Values and gradients to 1e-5 of the reference's."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, n, C)).astype(np.float32) for n in (H, K, K))
    weights = rng.normal(size=q.shape).astype(np.float32)
    segments = np.sort(rng.integers(0, 4, (B, T)), axis=1) if segmented else None
    slopes = alibi_slopes(H) if alibi else None
    order = zigzag(T, mesh.shape["context"])

    def run(on, kernels, arrays, segments):
        def total(q, k, v, weights):
            out = attention(q, k, v, AttentionMask(window, segments, slopes), kernels)
            return jnp.sum(weights * out), out

        def step(*arrays):
            if not on:
                return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arrays)
            with on_mesh(mesh):
                return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arrays)

        (_, out), grads = jax.jit(step)(*arrays)
        return out, *grads

    want = run(False, Kernels(attention="reference"), (q, k, v, weights), segments)
    moved = tuple(
        jax.device_put(a[:, order], jax.NamedSharding(mesh, jax.P())) for a in (q, k, v, weights)
    )
    segments = None if segments is None else segments[:, order]
    found = run(True, Kernels(context=form), moved, segments)
    for got, expected in zip(found, want, strict=True):
        error = np.linalg.norm(got - expected[:, order]) / np.linalg.norm(expected)
        assert error < 1e-5, (dict(mesh.shape), form, window, K, segmented, alibi, error)


whole = build_mesh(MeshConfig(context=4, fsdp=2))
mixed = build_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
heads = build_mesh(MeshConfig(context=2, tensor=4, fsdp=1))
check(whole, "gathered")
check(whole, "ring")
check(whole, "gathered", window=4)  # within a chunk: the halo
check(mixed, "gathered", window=40)
check(mixed, "ring", segmented=False)
check(mixed, "ring", window=17, segmented=False)  # a halo of a whole chunk
check(heads, "ring", K=2)  # fewer key heads than devices along tensor
check(heads, "ring", alibi=True, K=4)
check(heads, "gathered", window=3, K=1)
