"""The router's losses are transformers' and, layer by layer, those that OLMoE was trained with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from olmo_jax.generate.decoder import unstacked
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.rope import rope_tables
from olmo_jax.model.transformer import Transformer, init
from olmo_jax.ops.attention import AttentionMask
from olmo_jax.ops.experts import load_balancing_loss, route, router_sums, router_z_loss

MODEL = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=3,
    n_heads=4,
    mlp_width=16,
    norm_place="pre",
    n_experts=6,
    experts_per_token=2,
    init_std=0.5,
)
TOKENS = np.random.default_rng(0).integers(0, 97, (3, 20)).astype(np.int32)
SEEN = np.arange(20) < np.array([[20], [13], [7]])  # the rest is padding


@pytest.fixture(scope="module")
def routed():
    """A model, our sums, and every router's logits."""
    model = init(MODEL)
    weights_BT = SEEN / SEEN.sum()
    _, sums = model.hidden_and_routing(TOKENS, weights_BT=jnp.asarray(weights_BT))
    return model, sums, logits_of(model)


def logits_of(model: Transformer) -> list[np.ndarray]:
    """What each router says of each token: the model again, layer by layer, in plain steps."""
    decoder, out = unstacked(model), []
    ropes = rope_tables(model.config, jnp.arange(TOKENS.shape[1])[None])
    x_BTD = decoder.embed.weight[...][TOKENS]
    for layer in decoder.layers:
        attended, _ = layer.attention(layer.attention_norm(x_BTD), ropes.of(0), AttentionMask())
        seen_BTD = layer.mlp_norm(x_BTD + attended)
        out.append(np.asarray(seen_BTD @ layer.mlp.router.weight[...]).reshape(-1, 6))
        x_BTD = layer(x_BTD, ropes.of(0), AttentionMask())[0]
    return out


def theirs(logits: list[np.ndarray]) -> float:
    """transformers' loss of these layers together, without padding."""
    tensors = tuple(torch.tensor(a) for a in logits)
    return float(load_balancing_loss_func(tensors, 6, 2, torch.tensor(SEEN)))


def test_one_layers_balancing_loss_times_top_k_is_transformers(routed):
    _, sums, logits = routed
    for layer in range(3):
        ours = load_balancing_loss(sums.load_E[layer : layer + 1], sums.probability_E[layer][None])
        assert float(2 * ours) == pytest.approx(theirs([logits[layer]]), rel=1e-5)


def test_several_layers_are_each_balanced_as_in_megablocks(routed):
    _, sums, logits = routed
    ours = 2 * float(load_balancing_loss(sums.load_E, sums.probability_E))
    assert ours == pytest.approx(np.mean([theirs([a]) for a in logits]), rel=1e-5)
    # transformers multiplies means over all layers: another, smaller number
    assert theirs(logits) < ours - 1e-3


def test_the_z_loss_is_the_mean_square_of_the_routers_log_sums(routed):
    _, sums, logits = routed
    z = [np.square(np.log(np.exp(a.astype(np.float64)).sum(1)))[SEEN.reshape(-1)] for a in logits]
    assert float(router_z_loss(sums.z)) == pytest.approx(np.mean(z), rel=1e-5)


def test_the_losses_gradient_to_the_router_is_torchs(routed):
    model, _, _ = routed
    inputs_ND = jax.random.normal(jax.random.key(0), (SEEN.size, 32))

    def ours(router_DE):
        weights_N = jnp.asarray(SEEN.reshape(-1) / SEEN.sum())
        found = inputs_ND @ router_DE
        one = router_sums(found, route(found, 2, False), weights_N)
        return load_balancing_loss(one.load_E[None], one.probability_E[None])

    router_DE = model.layers.mlp.router.weight[...][0]
    weight = torch.tensor(np.asarray(router_DE), requires_grad=True)
    found = torch.tensor(np.asarray(inputs_ND)) @ weight
    load_balancing_loss_func((found,), 6, 2, torch.tensor(SEEN)).backward()
    wanted = weight.grad.numpy()
    error = np.linalg.norm(2 * jax.grad(ours)(router_DE) - wanted) / np.linalg.norm(wanted)
    assert error <= 1e-4
