"""What the fused attention kernels are held to, on a CPU (ops/) and on the devices (device/)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.ops.attention_mask import AttentionMask, scores

B, H, K, C = 2, 4, 2, 64
RNG = np.random.default_rng(0)


def arrays(T: int, S: int, dtype):
    shapes = (B, T, H, C), (B, S, K, C), (B, S, K, C), (B, T, H, C)
    return [jnp.asarray(RNG.normal(size=shape), dtype) for shape in shapes]


def documents(S: int, count: int) -> np.ndarray:
    """Ids of runs, another number of them in each row, and padding at the end of the first."""
    ids = np.stack([np.sort(RNG.integers(1, count + 1 + row, S)) for row in range(B)])
    ids[0, -S // 10 :] = 0
    return ids.astype(np.int32)


def plain(q_BTHC, k_BSKC, v_BSKC, mask):
    """Output and log-sums by the definition, in float32."""
    with jax.default_matmul_precision("highest"):  # a GPU would take TF32
        return _plain(q_BTHC, k_BSKC, v_BSKC, mask)


def _plain(q_BTHC, k_BSKC, v_BSKC, mask):
    q, k, v = (a.astype(jnp.float32).swapaxes(1, 2) for a in (q_BTHC, k_BSKC, v_BSKC))
    T, S = q.shape[2], k.shape[2]
    s = scores(q.reshape(B, K, H // K, T, C), k, mask, slice(0, T), slice(0, S))
    out = jnp.einsum("bkgts,bksc->bkgtc", jax.nn.softmax(s, axis=-1), v)
    log_sum = jax.nn.logsumexp(s, axis=-1).reshape(B, H, T)
    return out.reshape(B, H, T, C).swapaxes(1, 2), log_sum.swapaxes(1, 2)


def check(form, T, S, mask, dtype, tolerance):
    q, k, v, d_out = arrays(T, S, dtype)
    (want, want_sum), pull = jax.vjp(partial(plain, mask=mask), q, k, v)
    want_grads = pull((d_out.astype(jnp.float32), jnp.zeros_like(want_sum)))

    @jax.jit
    def run(q, k, v, d_out):
        out, log_sum = form.forward(q, k, v, mask)
        return out, log_sum, form.backward(q, k, v, mask, out, log_sum, d_out)

    out, log_sum, grads = run(q, k, v, d_out)
    assert out.dtype == dtype and log_sum.dtype == jnp.float32
    np.testing.assert_allclose(log_sum, want_sum, rtol=tolerance, atol=tolerance)
    for got, expected in zip((out, *grads), (want, *want_grads), strict=True):
        expected = np.asarray(expected, np.float32)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=tolerance * scale)


def halo(T, window):
    """A chunk of queries behind the window - 1 keys before it, the first of them no document's."""
    ids = documents(T + window - 1, 5)
    ids[:, :10] = -1
    return AttentionMask(window, ids[:, window - 1 :], offset=window - 1, key_segment_ids_BS=ids)


def check_parts(form, dtype, tolerance):
    """A row's last queries against its first keys and their own, put together, as a ring does."""
    T = 128
    ids = documents(2 * T, 3)
    q, k, v, d_out = arrays(T, 2 * T, dtype)
    whole = AttentionMask(0, ids[:, T:], offset=T, key_segment_ids_BS=ids)
    (want, _), pull = jax.vjp(partial(plain, mask=whole), q, k, v)
    want_grads = pull((d_out.astype(jnp.float32), jnp.zeros((B, T, H))))
    before = AttentionMask(0, ids[:, T:], key_segment_ids_BS=ids[:, :T], causal=False)
    parts = (slice(0, T), before), (slice(T, 2 * T), AttentionMask(0, ids[:, T:]))

    @jax.jit
    def run(q, k, v, d_out):
        outs, sums = zip(*(form.forward(q, k[:, p], v[:, p], m) for p, m in parts), strict=True)
        log_sum = jnp.logaddexp(*sums)
        shares = [jnp.exp(a - log_sum)[..., None] for a in sums]
        out = sum(o.astype(jnp.float32) * share for o, share in zip(outs, shares, strict=True))
        saved = out.astype(dtype), log_sum, d_out
        grads = [form.backward(q, k[:, p], v[:, p], m, *saved) for p, m in parts]
        dq, dk, dv = zip(*grads, strict=True)
        return out, sum(dq), jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)

    assert (ids[0, T - 1] == ids[0, T]) or (ids[1, T - 1] == ids[1, T]), "a document in both parts"
    for got, expected in zip(run(q, k, v, d_out), (want, *want_grads), strict=True):
        expected = np.asarray(expected, np.float32)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=tolerance * scale)


CASES = {
    "all before": lambda: (256, 256, AttentionMask()),
    "window and documents": lambda: (256, 256, AttentionMask(100, documents(256, 6))),
    "a length that is no multiple of the blocks": lambda: (
        200,
        200,
        AttentionMask(0, documents(200, 4)),
    ),
    "queries behind keys": lambda: (128, 256, AttentionMask(offset=128)),
    "a window's halo": lambda: (128, 192, halo(128, 65)),
}
