"""Every form of the experts equals the reference, and no token is ever dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.ops import experts_grouped as ops
from olmo_jax.ops.experts import Routing, experts, load_balancing_loss, route, router_sums

FORMS = ["grouped", "ragged"]


def case(N, E, A, D=24, F=16, dtype=jnp.float32, seed=0):
    """Tokens, router logits and weights of E experts."""
    keys = jax.random.split(jax.random.key(seed), 5)
    draw = jax.random.normal
    x_ND = draw(keys[0], (N, D)).astype(dtype)
    weights = [
        0.3 * draw(k, s) for k, s in zip(keys[2:], [(E, D, F)] * 2 + [(E, F, D)], strict=True)
    ]
    return x_ND, draw(keys[1], (N, E)), weights


def value_and_gradients(form, x_ND, logits_NE, weights, A, normalize=False):
    """y, and the gradients of a bent sum of it to x, logits and weights, in float32."""

    def total(x_ND, logits_NE, weights):
        routing = route(logits_NE, A, normalize)[:2]
        y_ND = experts(x_ND, *routing, *weights, form).astype(jnp.float32)
        return jnp.sum(jnp.sin(y_ND + jnp.arange(y_ND.shape[0])[:, None])), y_ND

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, y_ND), gradients = run(x_ND, logits_NE, weights)
    return [np.asarray(a, np.float32) for a in jax.tree.leaves((y_ND, gradients))]


def assert_same(left, right, tolerance):
    for a, b in zip(left, right, strict=True):  # 1: some gradients are 0 but for rounding
        assert np.linalg.norm(a - b) <= tolerance * max(1, np.linalg.norm(b))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "N, E, A, normalize",
    [(1, 4, 2, False), (7, 3, 1, False), (96, 5, 2, True), (64, 16, 4, False), (300, 2, 1, True)],
    ids=str,
)
def test_a_fast_form_equals_the_reference(form, N, E, A, normalize):
    args = *case(N, E, A), A, normalize
    assert_same(value_and_gradients(form, *args), value_and_gradients("reference", *args), 5e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_fast_form_equals_the_reference_in_bfloat16(form):
    x_ND, logits_NE, weights = case(96, 5, 2, dtype=jnp.bfloat16)
    exact = value_and_gradients("reference", x_ND.astype(jnp.float32), logits_NE, weights, 2)
    found = value_and_gradients(form, x_ND, logits_NE, weights, 2)
    assert experts(x_ND, *route(logits_NE, 2, False)[:2], *weights, form).dtype == jnp.bfloat16
    assert_same(found, exact, 1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("favourite", [0, 3])
def test_no_token_is_dropped_when_all_choose_the_same_expert(form, favourite):
    x_ND, logits_NE, weights = case(200, 8, 1)
    logits_NE = logits_NE.at[:, favourite].add(100)
    args = x_ND, logits_NE, weights, 1
    found, same = (value_and_gradients(f, *args) for f in (form, "reference"))
    assert_same(found, same, 5e-6)
    assert np.all(np.linalg.norm(found[0], axis=1) > 0)
    gate, up, down = (w[favourite] for w in weights)
    alone = (jax.nn.silu(x_ND @ gate) * (x_ND @ up)) @ down
    np.testing.assert_allclose(found[0], alone, rtol=1e-5, atol=1e-5)


def test_the_blocks_hold_every_copy_once_whatever_the_routing():
    rng = np.random.default_rng(0)
    for N, E, A in ((1, 64, 8), (50, 64, 8), (256, 4, 1), (1000, 8, 2)):
        for skew in (0, 3):
            logits = rng.normal(size=(N, E)) - skew * np.arange(E)
            chosen_NA = np.argsort(-logits)[:, :A].astype(np.int32)
            R = ops._block_rows(N * A, E)
            blocks = jax.device_get(ops._blocks(jnp.asarray(chosen_NA), E, R))
            assert blocks.used <= len(blocks.expert_J)
            seen = []
            for expert, start, rows in list(zip(*blocks[2:5], strict=True))[: blocks.used]:
                copies = blocks.copy_M[start : start + rows]
                assert 0 < rows <= R
                assert np.all(chosen_NA.reshape(-1)[copies] == expert)
                seen += copies.tolist()
            assert sorted(seen) == list(range(N * A))


def test_routing_is_a_softmax_over_all_experts_and_then_the_largest():
    logits_NE = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    routing = route(logits_NE, 2, False)
    np.testing.assert_allclose(routing.weights_NA, [[0.4, 0.3]], rtol=1e-6)
    assert routing.chosen_NA.tolist() == [[1, 3]]
    np.testing.assert_allclose(route(logits_NE, 2, True).weights_NA, [[4 / 7, 3 / 7]], rtol=1e-6)
    assert route(logits_NE.astype(jnp.bfloat16), 2, False).weights_NA.dtype == jnp.float32


def test_router_sums_count_with_the_tokens_weights():
    _, logits_NE, _ = case(60, 6, 2)
    routing = route(logits_NE, 2, False)
    weights_N = jnp.where(jnp.arange(60) < 40, 1 / 40, 0.0)
    sums = router_sums(logits_NE, routing, weights_N)
    counts = np.bincount(np.asarray(routing.chosen_NA[:40]).reshape(-1), minlength=6)
    np.testing.assert_allclose(sums.load_E, counts / 40, rtol=1e-6)
    np.testing.assert_allclose(sums.probability_E, routing.probabilities_NE[:40].mean(0), rtol=1e-5)
    z = np.log(np.exp(np.asarray(logits_NE[:40])).sum(1)) ** 2
    np.testing.assert_allclose(sums.z, z.mean(), rtol=1e-5)


def test_the_balancing_loss_is_one_when_balanced_and_grows_with_imbalance():
    even = jnp.full((3, 8), 2 / 8), jnp.full((3, 8), 1 / 8)
    np.testing.assert_allclose(load_balancing_loss(*even), 1, rtol=1e-6)
    one_sided = jnp.zeros((3, 8)).at[:, :2].set(1.0), jnp.zeros((3, 8)).at[:, :2].set(0.5)
    np.testing.assert_allclose(load_balancing_loss(*one_sided), 8 / 2, rtol=1e-6)


def test_the_balancing_loss_pushes_probability_away_from_the_fullest_expert():
    def loss(logits_NE):
        sums = router_sums(logits_NE, route(logits_NE, 1, False), jnp.full(4, 1 / 4))
        return load_balancing_loss(sums.load_E[None], sums.probability_E[None])

    gradient_NE = jax.grad(loss)(jnp.zeros((4, 3)).at[:, 1].set(1.0))
    assert np.all(gradient_NE[:, 1] > 0)
    assert np.all(gradient_NE[:, [0, 2]] < 0)


def test_experts_with_chosen_weights_of_zero_add_nothing():
    x_ND, logits_NE, weights = case(10, 4, 2)
    routing = route(logits_NE, 2, False)
    nothing = Routing(jnp.zeros_like(routing.weights_NA), *routing[1:])
    for form in FORMS:
        assert not np.any(experts(x_ND, *nothing[:2], *weights, form))
