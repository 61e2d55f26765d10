"""The FLOP counter against counts made by hand, on programs small enough to count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import abstract_model, bind, parameters
from olmo_jax.ops.kernels import Kernels
from olmo_jax.plan.count import count, traced_flops, visible_pairs

F32 = jnp.float32


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def chain(x, w_LDD):
    """Three products of a scan."""
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_LDD)[0])


def test_a_product_is_two_flops_for_each_multiply_and_add():
    assert traced_flops(lambda x, w: x @ w, shape(3, 4), shape(4, 5)) == 2 * 3 * 4 * 5
    batched = traced_flops(
        lambda q, k: jnp.einsum("bthc,bshc->bhts", q, k), shape(2, 3, 4, 5), shape(2, 7, 4, 5)
    )
    assert batched == 2 * 2 * 3 * 7 * 4 * 5


def test_a_loop_counts_as_often_as_it_runs_and_its_gradient_twice_as_much():
    args = shape(8, 16), shape(5, 16, 16)
    once = 5 * 2 * 8 * 16 * 16
    assert traced_flops(chain, *args) == once
    assert traced_flops(jax.grad(chain, (0, 1)), *args) == 3 * once


def test_what_remat_makes_again_is_counted_again():
    def body(x, w):
        return jnp.tanh(x @ w), None

    def remat(x, w):
        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, w)[0])

    args = shape(8, 16), shape(5, 16, 16)
    assert traced_flops(jax.grad(remat, (0, 1)), *args) == 4 * traced_flops(chain, *args)


def test_of_a_condition_the_larger_branch():
    def f(p, x):
        return jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert traced_flops(f, shape(dtype=jnp.bool_), shape(4, 4)) == 2 * 2 * 4**3


def test_a_loop_of_unknown_length_is_said_so():
    def f(n, x):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    total = count(jax.jit(f).trace(shape(dtype=jnp.int32), shape(4, 4)).jaxpr)
    assert total.flops == 2 * 4**3 and total.notes


def test_a_grouped_product_visits_one_matrix_a_row_forward_and_backward():
    def f(x, w, sizes):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes))

    args = shape(32, 8), shape(4, 8, 16), shape(4, dtype=jnp.int32)
    assert traced_flops(f, *args) == 2 * 32 * 8 * 16
    assert traced_flops(jax.grad(f, (0, 1)), *args) == 3 * 2 * 32 * 8 * 16


def test_shards_add_up_to_the_whole():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    spec = jax.sharding.PartitionSpec("data")

    def f(x, w):
        mapped = jax.shard_map(
            lambda x, w: x @ w,
            mesh=mesh,
            in_specs=(spec, jax.sharding.PartitionSpec()),
            out_specs=spec,
        )
        return mapped(x, w)

    assert traced_flops(f, shape(8, 16), shape(16, 16)) == 2 * 8 * 16 * 16


@pytest.mark.parametrize("window", [None, 0, 1, 3, 100])
def test_visible_pairs_are_those_of_the_mask(window):
    T = 17
    q, k = np.indices((T, T))
    seen = np.ones((T, T), bool) if window is None else q >= k
    if window:
        seen &= q - k < window
    assert visible_pairs(T, T, window) == seen.sum()


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("window", [0, 256])
@pytest.mark.parametrize(("fused", "backward"), [(False, 7), (True, 5)])
def test_splash_counts_the_pairs_of_its_mask(window, fused, backward, listed):
    """Forward 2 products, again under remat, and backward 5 in one kernel or 3 + 4 in two. Listed:
    the mask's blocks are arrays, not computed in the kernel."""
    T, H, B, C = 1024, 4, 2, 128
    mask = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    mask = masks.NumpyMask(np.asarray(mask[:, :])) if listed else mask
    sizes = splash.BlockSizes(
        *(128, 256, 128),
        block_q_dkv=128,
        block_kv_dkv=128,
        block_kv_dkv_compute=128,
        block_q_dq=None if fused else 128,
        block_kv_dq=None if fused else 128,
        use_fused_bwd_kernel=fused,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * H), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )

    def loss(q, k, v):
        def layer(q, _):  # the mask is a constant of a loop
            return jax.checkpoint(jax.vmap(kernel))(q, k, v), None

        return jnp.sum(jax.lax.scan(layer, q, None, length=3)[0].astype(F32))

    x = shape(B, H, T, C, dtype=jnp.bfloat16)
    total = count(jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x).jaxpr)
    by_hand = 3 * (2 + 2 + backward) * 2 * C * B * H * visible_pairs(T, T, window)
    # The pairs on the diagonal itself are counted as half: 1 in 2 T.
    assert total.kernels == pytest.approx(by_hand, rel=2e-3)
    assert not total.notes


def test_a_model_is_six_flops_a_weight_and_token_and_its_attention():
    """Forward and backward; scores over all pairs in the reference form."""
    config = ModelConfig(vocab_size=256, d_model=64, n_layers=3, n_heads=4, mlp_width=96)
    model = abstract_model(config, Kernels(attention="reference"))
    B, T = 2, 32

    def loss(params, tokens):
        return jnp.sum(bind(model, params)(tokens))

    flops = traced_flops(jax.grad(loss), parameters(model), shape(B, T, dtype=jnp.int32))
    weights = config.parameter_count(embedding=False) - _norms(config)
    attention = 12 * config.n_heads * config.head_width * T * config.n_layers
    assert flops == B * T * (6 * weights + attention)


def _norms(config):
    return config.n_layers * 4 * config.d_model + config.d_model
