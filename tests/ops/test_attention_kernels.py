"""The fused kernels of TPU and GPU against the plain form, on a CPU.

Splash runs in Pallas' interpreter. cuDNN's calls run as `contract`, what the makers say of them in
a few lines of jax; what is tested is all that is around them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.ops import attention_gpu
from olmo_jax.ops.attention_gpu import Cudnn
from olmo_jax.ops.attention_mask import AttentionMask, scores
from olmo_jax.ops.attention_tpu import Splash
from olmo_jax.ops.kernels import SplashBlocks

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

BLOCKS = SplashBlocks(128, 128, 128, 128, 128, 128)


@pytest.mark.parametrize("case", CASES)
def test_splash_has_the_plain_forms_values_and_gradients(case):
    check(Splash(BLOCKS, interpret=True), *CASES[case](), jnp.float32, 2e-5)


def test_splash_with_one_backward_kernel():
    fused = SplashBlocks(128, 256, 128, 128, 256, 128, fused=True)
    mask = AttentionMask(150, documents(256, 3))
    check(Splash(fused, interpret=True), 256, 256, mask, jnp.float32, 2e-5)


def test_splash_of_a_rings_parts():
    check_parts(Splash(BLOCKS, interpret=True), jnp.float32, 2e-5)


# --- cuDNN ----------------------------------------------------------------------------------------


def contract_ranges(pattern, q, k):
    """The document of each query and each key in the list of all rows' tokens (-1: none), and the
    place of each query in its own."""
    N, S = (a.shape[0] * a.shape[1] for a in (q, k))
    if pattern.documents == 1:
        queries, keys = pattern.arguments or (
            jnp.full(B, q.shape[1], jnp.int32),
            jnp.full(B, k.shape[1], jnp.int32),
        )
        rows = jnp.arange(B)
        starts = rows * q.shape[1], rows * k.shape[1]
    else:
        queries, keys = (a.reshape(-1) for a in pattern.arguments[:2])
        starts = (
            pattern.arguments[2].reshape(-1)[: queries.size] // (H * C),
            pattern.arguments[3].reshape(-1)[: keys.size] // (K * C),
        )

    def document(size, start, length):
        inside = (jnp.arange(size)[:, None] >= start) & (jnp.arange(size)[:, None] < start + length)
        return jnp.where(inside.any(1), jnp.argmax(inside, axis=1), -1)

    q_document, k_document = document(N, starts[0], queries), document(S, starts[1], keys)
    place = jnp.arange(N) - starts[0][q_document]
    key_place = jnp.arange(S) - starts[1][k_document]
    return q_document, k_document, place, key_place


def contract_scores(q, k, pattern):
    q_document, k_document, place, key_place = contract_ranges(pattern, q, k)
    q_NHC, k_SHC = q.reshape(-1, H, C), jnp.repeat(k.reshape(-1, K, C), H // K, axis=1)
    s_HNS = jnp.einsum("nhc,shc->hns", q_NHC, k_SHC) * C**-0.5
    seen = q_document[:, None] == k_document
    if "CAUSAL" in pattern.mask_type:
        seen &= place[:, None] >= key_place
        if pattern.window:
            seen &= place[:, None] - key_place < pattern.window
    return jnp.where(seen, s_HNS, -1e30), q_document, k_document, place


def contract_softmax(q, k, v, pattern):
    s_HNS, q_document, _, place = contract_scores(q, k, pattern)
    v_SHC = jnp.repeat(v.reshape(-1, K, C), H // K, axis=1)
    out_NHC = jnp.einsum("hns,shc->nhc", jax.nn.softmax(s_HNS, axis=-1), v_SHC)
    out_NHC = jnp.where(q_document[:, None, None] >= 0, out_NHC, jnp.nan)
    stats = jnp.full((q.shape[0] * pattern.documents, H, q.shape[1]), jnp.nan)
    index = jnp.where(q_document >= 0, q_document, stats.shape[0])
    log_sum_NH = jax.nn.logsumexp(s_HNS, axis=-1).T
    return out_NHC.reshape(q.shape), stats.at[index, :, place].set(log_sum_NH, mode="drop")


def contract_gradient(q, k, v, stats, d_out, out, pattern):
    s_HNS, q_document, k_document, place = contract_scores(q, k, pattern)
    p_HNS = jnp.exp(s_HNS - stats[q_document, :, place].T[:, :, None])
    p_HNS = jnp.where((q_document >= 0)[:, None], p_HNS, 0)
    d_out_NHC, out_NHC = (a.reshape(-1, H, C) for a in (d_out, out))
    v_SHC = jnp.repeat(v.reshape(-1, K, C), H // K, axis=1)
    dp_HNS = jnp.einsum("nhc,shc->hns", d_out_NHC, v_SHC)
    ds_HNS = p_HNS * (dp_HNS - jnp.sum(d_out_NHC * out_NHC, axis=-1).T[:, :, None]) * C**-0.5
    k_SHC = jnp.repeat(k.reshape(-1, K, C), H // K, axis=1)
    dq = jnp.einsum("hns,shc->nhc", ds_HNS, k_SHC)
    dk, dv = (
        jnp.einsum("hns,nhc->shc", *pair).reshape(-1, K, H // K, C).sum(2)
        for pair in ((ds_HNS, q.reshape(-1, H, C)), (p_HNS, d_out_NHC))
    )
    dq = jnp.where(q_document[:, None, None] >= 0, dq, jnp.nan)
    dk, dv = (jnp.where(k_document[:, None, None] >= 0, a, jnp.nan) for a in (dk, dv))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


@pytest.fixture
def contract(monkeypatch):
    monkeypatch.setattr(attention_gpu, "softmax_call", contract_softmax)
    monkeypatch.setattr(attention_gpu, "gradient_call", contract_gradient)


@pytest.mark.usefixtures("contract")
@pytest.mark.parametrize("case", CASES)
def test_cudnn_has_the_plain_forms_values_and_gradients(case):
    check(Cudnn(), *CASES[case](), jnp.float32, 2e-5)


@pytest.mark.usefixtures("contract")
def test_cudnn_with_more_documents_than_one_call_takes():
    ids = documents(256, 40)
    assert len(np.unique(ids[0])) + len(np.unique(ids[1])) > 2 * B * attention_gpu._slots(B, 256)
    check(Cudnn(), 256, 256, AttentionMask(30, ids), jnp.float32, 2e-5)


@pytest.mark.usefixtures("contract")
def test_cudnn_of_a_rings_parts():
    check_parts(Cudnn(), jnp.float32, 2e-5)


def test_an_ampere_gpu_takes_documents_in_blocks():
    mask = AttentionMask(100, documents(256, 6))
    check(Cudnn(packed=False), 256, 256, mask, jnp.float32, 2e-5)
