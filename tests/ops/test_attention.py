"""Attention against a loop over queries that any reader can check."""

import numpy as np
import pytest

from olmo_jax.ops.attention import AttentionMask, attention

B, T, H, K, C = 2, 9, 4, 2, 8
RNG = np.random.default_rng(0)
Q, KEYS, VALUES = (RNG.normal(size=(B, T, n, C)).astype(np.float32) for n in (H, K, K))
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 2, 2, 2]])


def plain(window, segments):
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
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[seen] / weights.sum()
    return out


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "segments"])
def test_equals_the_plain_loop(window, segments):
    mask = AttentionMask(window=window, segment_ids_BT=segments)
    np.testing.assert_allclose(
        attention(Q, KEYS, VALUES, mask), plain(window, segments), rtol=1e-5, atol=1e-6
    )
