"""The fused head and loss against the plain formula, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.ops.cross_entropy import cross_entropy

B, T, D, V = 3, 7, 5, 11
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, V, (B, T)))
WEIGHTS = jnp.asarray(RNG.random((B, T)) * (RNG.random((B, T)) < 0.7), jnp.float32)


def plain(x, w, z_loss):
    logits = x @ w
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, TARGETS[..., None], axis=-1)[..., 0]
    ce = jnp.sum(WEIGHTS * (log_z - target))
    z = z_loss * jnp.sum(WEIGHTS * log_z**2)
    return ce + z, (ce, z)


@pytest.mark.parametrize("chunk", [1, 4, 6, 21, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_the_plain_formula(chunk, z_loss):
    def fused(x, w):
        total, parts = cross_entropy(x, w, TARGETS, WEIGHTS, z_loss, chunk)
        return 3 * total, parts  # a cotangent that is not 1

    (total, parts), grads = jax.value_and_grad(fused, (0, 1), has_aux=True)(X, W)
    (want, want_parts), want_grads = jax.value_and_grad(
        lambda x, w: (3 * plain(x, w, z_loss)[0], plain(x, w, z_loss)[1]), (0, 1), has_aux=True
    )(X, W)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    np.testing.assert_allclose(parts, want_parts, rtol=1e-6)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(  # and without gradients
        cross_entropy(X, W, TARGETS, WEIGHTS, z_loss, chunk)[0], want / 3, rtol=1e-6
    )


def test_huge_logits_stay_finite():
    total, _ = cross_entropy(100 * X, 100 * W, TARGETS, WEIGHTS, 0.0, 4)
    assert np.isfinite(total)


def test_whole_logits_are_never_in_memory():
    x, w = jnp.zeros((4, 512, 64)), jnp.zeros((64, 8192))
    targets, weights = jnp.zeros((4, 512), jnp.int32), jnp.ones((4, 512))

    def memory(chunk):
        def total(x, w):
            return cross_entropy(x, w, targets, weights, 0.0, chunk)[0]

        compiled = jax.jit(jax.grad(total, (0, 1))).lower(x, w).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole_logits = 2048 * 8192 * 4
    assert memory(128) < whole_logits / 4 < memory(2048)


def test_a_head_in_pieces_is_the_same(monkeypatch):
    w, targets = jnp.asarray(RNG.normal(size=(D, 300)), jnp.float32), TARGETS * 29 % 300

    def gradients():
        def total(x, w):
            return cross_entropy(x, w, targets, WEIGHTS, 0.1, 4)[0]

        return jax.value_and_grad(total, (0, 1))(X, w)

    value, (dx, dw) = gradients()
    monkeypatch.setattr("olmo_jax.ops.cross_entropy._PIECE", 128 * D)
    jax.clear_caches()
    cut_value, (cut_dx, cut_dw) = gradients()
    np.testing.assert_allclose(cut_value, value, rtol=1e-6)
    np.testing.assert_allclose(cut_dx, dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cut_dw, dw, rtol=1e-5, atol=1e-6)
