"""Both forms of attention against a loop over queries that any reader can check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.ops.attention import AttentionMask, alibi_slopes, attention
from olmo_jax.ops.kernels import Kernels

B, T, H, K, C = 2, 9, 4, 2, 8
RNG = np.random.default_rng(0)
Q, KEYS, VALUES = (RNG.normal(size=(B, T, n, C)).astype(np.float32) for n in (H, K, K))
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 2, 2, 2]])


def plain(window, segments, slopes=(0,) * H):
    out = np.zeros_like(Q)
    for b in range(B):
        for h in range(H):
            k, v = KEYS[b, :, h // (H // K)], VALUES[b, :, h // (H // K)]
            for t in range(T):
                seen = [
                    s
                    for s in range(t + 1)
                    if (not window or t - s < window)
                    and (segments is None or segments[b, s] == segments[b, t])
                ]
                scores = k[seen] @ Q[b, t, h] / np.sqrt(C)
                scores -= slopes[h] * (t - np.array(seen))
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[seen] / weights.sum()
    return out


@pytest.mark.parametrize("form", ["reference", "blocked"])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "segments"])
@pytest.mark.parametrize("slopes", [(0, 0, 0, 0), (0.25, 0.0625, 0.015625, 0.00390625)])
def test_equals_the_plain_loop(window, segments, slopes, form):
    slopes_H = np.array(slopes, np.float32) if any(slopes) else None
    mask = AttentionMask(window, segments, slopes_H)
    want, kernels = plain(window, segments, slopes), Kernels(attention=form)
    np.testing.assert_allclose(
        attention(Q, KEYS, VALUES, mask, kernels), want, rtol=1e-5, atol=1e-6
    )


def test_alibi_slopes_of_a_head_count_that_is_no_power_of_two():
    assert alibi_slopes(6).tolist() == [2.0**-e for e in (2, 4, 6, 8, 1, 3)]


@pytest.mark.parametrize("window", [0, 1, 40, 200])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_the_blocked_form_has_the_references_values_and_gradients(window, segmented, alibi):
    T = 300  # three blocks, the last one short
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, C)), jnp.float32) for n in (H, K, K))
    segments = np.sort(rng.integers(0, 4, (B, T)), axis=1) if segmented else None
    mask = AttentionMask(window, segments, alibi_slopes(H) if alibi else None)
    weights = rng.normal(size=(B, T, H, C)).astype(np.float32)

    def total(form):
        return jax.value_and_grad(
            lambda q, k, v: jnp.sum(weights * attention(q, k, v, mask, Kernels(attention=form))),
            (0, 1, 2),
        )

    value, grads = jax.jit(total("blocked"))(q, k, v)
    want, want_grads = jax.jit(total("reference"))(q, k, v)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max() + 1e-5)


@pytest.mark.parametrize("alibi", [False, True])
def test_the_blocked_form_keeps_no_scores_for_the_backward_pass(alibi):
    T = 1024
    q = jnp.zeros((1, T, 1, C))

    def memory(form):
        def total(q):
            mask = AttentionMask(slopes_H=alibi_slopes(1) if alibi else None)
            return jnp.sum(attention(q, q, q, mask, Kernels(attention=form)))

        compiled = jax.jit(jax.grad(total)).lower(q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory("blocked") < memory("reference") / 2
