"""Weights in int8: what they cost in exactness, and what they save in memory."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmo_jax.generate import Engine, Request
from olmo_jax.generate.decoder import unstacked
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import init
from olmo_jax.ops import int8

CONFIG = ModelConfig(
    vocab_size=128,
    d_model=64,
    n_layers=2,
    n_heads=4,
    mlp_width=96,
    context_length=64,
    init_std=0.1,
)


@pytest.mark.parametrize("N", [1, 40])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("blocked", [True, False])
def test_a_product_is_that_of_the_rounded_weights(N, dtype, blocked):
    """Several blocks, the last of which does not fit; an output whose weights are all zero."""
    O, I = 137, 8192
    rng = np.random.default_rng(0)
    w_OI = rng.normal(size=(O, I)).astype(np.float32) * rng.lognormal(size=(O, 1))
    w_OI[3] = 0
    x_NI = jnp.asarray(rng.normal(size=(N, I)), dtype)
    q_OI, scale_O = int8.quantize(jnp.asarray(w_OI))
    assert q_OI.dtype == jnp.int8 and scale_O.shape == (O,)
    rounded_OI = np.asarray(q_OI, np.float64) * np.asarray(scale_O)[:, None]
    # Half a step of 127 to the largest weight of the output.
    assert np.all(np.abs(rounded_OI - w_OI) <= np.abs(w_OI).max(1, keepdims=True) / 253)
    expected_ON = rounded_OI @ np.asarray(x_NI, np.float64).T
    found_ON = jax.jit(int8.product, static_argnums=3)(q_OI, scale_O, x_NI, blocked)
    size = np.abs(rounded_OI).max() * np.sqrt(I)
    np.testing.assert_allclose(found_ON, expected_ON, rtol=1e-5, atol=1e-5 * size)


def test_logits_are_close():
    """A weight is off by at most 1/254 of its output's largest, which is about 2.5 deviations: by
    0.6 % of a deviation in the mean. A product's output keeps that share, and some ten products
    follow one another: 3 % of a position's logits is asked for, 2 % is found."""
    model = init(CONFIG)
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 32))

    @jax.jit
    def logits(decoder):
        x_BTD, _ = decoder(tokens_BT, jnp.arange(32)[None], None)
        return decoder.logits(x_BTD.reshape(-1, CONFIG.d_model))

    exact, rounded = (logits(unstacked(model, in_int8)) for in_int8 in (False, True))
    norm = jnp.linalg.norm
    off = float(jnp.median(norm(rounded - exact, axis=0) / norm(exact, axis=0)))
    assert 1e-4 < off < 0.03, off


def test_what_is_no_product_of_a_layer_stays():
    """Experts with their router, and the embedding, which a tied head is."""
    config = dataclasses.replace(CONFIG, tie_embeddings=True, n_experts=4, experts_per_token=2)
    decoder = jax.eval_shape(lambda: unstacked(init(config), True))
    dtypes: dict[str, set] = {}
    for path, a in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(decoder))):
        if path[-1].key == "weight":
            dtypes.setdefault(path[-2].key, set()).add(a.dtype)
    in_int8 = {name for name, found in dtypes.items() if found == {jnp.dtype(jnp.int8)}}
    assert in_int8 == {"q", "k", "v", "out"}
    assert {"router", "gate", "up", "down", "embed"} <= dtypes.keys() - in_int8


def texts(model, requests, slots):
    engine = Engine(model, slots=slots, int8=True)
    out: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            out[event.id] += event.token_ids
    return list(out.values())


def test_greedy_tokens_are_mostly_the_float_models_and_the_same_in_a_batch():
    model, rng = init(dataclasses.replace(CONFIG, n_layers=1)), np.random.default_rng(0)
    requests = [
        Request(tuple(rng.integers(0, CONFIG.vocab_size, p).tolist()), n)
        for p, n in ((5, 20), (14, 30), (1, 13), (16, 28), (3, 33))
    ]
    together = texts(model, requests, 3)
    assert together == [texts(model, [request], 1)[0] for request in requests]
    # Of random weights two tokens are often nearly as likely.
    rows_RT = np.zeros((len(requests), CONFIG.context_length), np.int32)
    for row_T, request, text in zip(rows_RT, requests, together, strict=True):
        row_T[: len(request.prompt_ids) + len(text)] = [*request.prompt_ids, *text]
    exact_RT = np.asarray(jax.jit(lambda model: model(rows_RT))(model)).argmax(-1)
    same = [
        exact_T[len(request.prompt_ids) - 1 + i] == token
        for exact_T, request, text in zip(exact_RT, requests, together, strict=True)
        for i, token in enumerate(text)
    ]
    assert np.mean(same) > 0.9, np.mean(same)


def test_products_take_a_quarter_and_the_float_weights_are_gone():
    def live():
        gc.collect()
        return sum(a.nbytes for a in jax.live_arrays())

    def weights(engine, of_int8):
        leaves = jax.tree.leaves(engine._weights)
        return sum(a.nbytes for a in leaves if (a.dtype == jnp.int8) == of_int8)

    model = init(CONFIG)
    exact = weights(Engine(model, slots=1), False)
    d, layers, V = CONFIG.d_model, CONFIG.n_layers, CONFIG.rows
    products = layers * (4 * d * d + 3 * d * CONFIG.mlp_width) + d * V
    del model
    before = live()
    engine = Engine(init(CONFIG), slots=1, int8=True)
    assert weights(engine, True) == products
    scales = layers * (5 * d + 2 * CONFIG.mlp_width) + V
    assert weights(engine, False) == exact - 4 * products + 4 * scales
    assert live() - before == products + weights(engine, False)
