"""The fused kernels of TPU and GPU against the plain form, on a CPU.

Splash runs in Pallas' interpreter. cuDNN's calls run as `contract`, what the makers say of them in
a few lines of jax; what is tested is all that is around them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, B, C, H, K, check, check_parts, documents

from olmo_jax.ops import attention_gpu
from olmo_jax.ops.attention_gpu import Cudnn
from olmo_jax.ops.attention_mask import AttentionMask
from olmo_jax.ops.attention_tpu import Splash
from olmo_jax.ops.kernels import SplashBlocks

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
