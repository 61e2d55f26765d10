"""Properties of the model that hold for every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.presets import olmo1_1b
from olmo_jax.model.transformer import abstract_model, bind, init, parameters

TINY = ModelConfig(
    vocab_size=97, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, mlp_width=48, context_length=64
)
VARIANTS = {
    "olmo2": TINY,
    "olmo1": dataclasses.replace(
        TINY,
        n_kv_heads=None,
        norm="layer_nonparametric",
        norm_place="pre",
        qk_norm=False,
        clip_qkv=0.05,
        init="mitchell",
        tie_embeddings=True,
    ),
    "olmoe": dataclasses.replace(
        TINY, norm_eps=1e-5, norm_place="pre", n_experts=5, experts_per_token=2, rope_theta=1e4
    ),
    "neox": dataclasses.replace(
        TINY,
        n_kv_heads=None,
        norm="layer",
        norm_place="pre",
        qk_norm=False,
        bias=True,
        parallel_residual=True,
        mlp="gelu",
        rope_fraction=0.25,
    ),
    "windows": dataclasses.replace(TINY, window_pattern=(3, 3, 3, 0)),
    "irregular windows": dataclasses.replace(TINY, window_pattern=(3, 0, 5, 5)),
    "olmo3 long": dataclasses.replace(
        TINY,
        window_pattern=(3, 3, 3, 0),
        rope_scaling="yarn",
        rope_factor=8.0,
        rope_original_context=16,
    ),
    "llama3": dataclasses.replace(
        TINY,
        norm_place="pre",
        qk_norm=False,
        head_dim=6,
        rope_scaling="llama3",
        rope_factor=4.0,
        rope_original_context=16,
    ),
    "mpt": dataclasses.replace(
        TINY,
        n_heads=6,
        head_dim=4,
        n_kv_heads=None,
        norm="layer",
        norm_place="pre",
        qk_norm=False,
        mlp="gelu",
        position="alibi",
        tie_embeddings=True,
    ),
}


def tokens(B, T, seed=0):
    return np.random.default_rng(seed).integers(0, 97, (B, T)).astype(np.int32)


def perturbed(model, scale=0.3):
    """Weights far enough from their initial values that every path through the model matters."""
    leaves, structure = jax.tree.flatten(parameters(model))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        a + scale * (jnp.std(a) + 0.1) * jax.random.normal(k, a.shape)
        for a, k in zip(leaves, keys, strict=True)
    ]
    return bind(model, jax.tree.unflatten(structure, noisy))


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def model(request):
    return perturbed(init(VARIANTS[request.param]))


def test_packed_documents_get_the_logits_that_they_have_alone(model):
    lengths = (5, 9, 2, 8)
    row = tokens(1, sum(lengths))
    segment_ids = np.repeat(np.arange(1, 5), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = model(row, segment_ids=segment_ids, positions=positions)[0]
    alone = [model(part[None])[0] for part in np.split(row[0], np.cumsum(lengths)[:-1])]
    alone = np.concatenate(alone)
    np.testing.assert_allclose(packed, alone, atol=1e-5 * np.abs(alone).max())
    # and it is the segment ids that do it:
    assert np.abs(model(row, positions=positions)[0] - alone).max() > 1e-2


def test_a_token_sees_only_what_came_before(model):
    a, b = tokens(1, 12), tokens(1, 12)
    b[0, 7:] = tokens(1, 5, seed=9)
    np.testing.assert_allclose(model(a)[0, :7], model(b)[0, :7], rtol=1e-5, atol=1e-5)
    assert np.abs(model(a)[0, 7:] - model(b)[0, 7:]).max() > 1e-2


def test_the_parameter_count_is_the_formulas(model):
    assert sum(a.size for a in jax.tree.leaves(parameters(model))) == (
        model.config.parameter_count()
    )


@pytest.mark.parametrize("remat", ["full", "projections"])
def test_remat_changes_memory_not_gradients(model, remat):
    row = tokens(2, 8)
    other = abstract_model(dataclasses.replace(model.config, remat=remat))

    def loss(params, structure):
        return jnp.mean(jnp.square(bind(structure, params)(row)))

    params = parameters(model)
    plain, again = (jax.grad(loss)(params, m) for m in (model, other))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), plain, again
    )


def test_scanned_layers_are_the_unrolled_ones(model):
    row = tokens(2, 24)
    logits = []
    for layers in ("scanned", "unrolled"):
        kernels = dataclasses.replace(model.kernels, layers=layers)
        other = bind(abstract_model(model.config, kernels), parameters(model))
        logits.append(jax.jit(lambda m, t: m(t))(other, row))
    np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits[0]).max())


def test_a_window_of_w_sees_w_tokens():
    one_layer = dataclasses.replace(TINY, n_layers=1, window_pattern=(3,))
    model = perturbed(init(one_layer))
    a = tokens(1, 8)
    b = a.copy()
    b[0, 2] = (b[0, 2] + 1) % 97
    changed = np.abs(model(a) - model(b)).max(axis=-1)[0] > 1e-6
    assert changed.tolist() == [False, False, True, True, True, False, False, False]


def test_bfloat16_stays_near_float32():
    model = init(TINY)
    low = bind(
        abstract_model(dataclasses.replace(TINY, compute_dtype="bfloat16")), parameters(model)
    )
    logits, near = model(tokens(2, 8)), low(tokens(2, 8))
    assert near.dtype == jnp.float32
    assert 0 < np.abs(logits - near).max() < 0.05 * np.abs(logits).max()


def test_weights_are_a_function_of_the_seed():
    a, b, c = (parameters(init(TINY, seed)) for seed in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
    assert not np.array_equal(a["embed"]["weight"], c["embed"]["weight"])
    q, k = (np.asarray(a["layers"]["attention"][n]["weight"])[..., :16] for n in ("q", "k"))
    assert not np.array_equal(q, k)  # each parameter has its own draw,
    assert not np.array_equal(q[0], q[1])  # and so has each layer


def test_initial_scales_are_the_published_ones():
    wide = ModelConfig(vocab_size=512, d_model=256, n_layers=3, n_heads=4, mlp_width=512)
    # A normal cut at 3 sigma keeps 0.9866 of its deviation.
    normal = parameters(init(wide))
    for a in (normal["embed"], normal["lm_head"], normal["layers"]["mlp"]["down"]):
        assert np.std(a["weight"]) == pytest.approx(0.02 * 0.9866, rel=0.01)
        assert np.abs(a["weight"]).max() <= 0.06
    changes = {f: getattr(olmo1_1b(), f) for f in ("init", "norm", "norm_place", "qk_norm")}
    mitchell = parameters(init(dataclasses.replace(wide, **changes)))["layers"]
    assert np.std(mitchell["mlp"]["up"]["weight"]) == pytest.approx(0.9866 / 16, rel=0.01)
    for layer in range(3):
        out = np.std(mitchell["attention"]["out"]["weight"][layer])
        down = np.std(mitchell["mlp"]["down"]["weight"][layer])
        assert out == pytest.approx(0.9866 / np.sqrt(2 * 256 * (layer + 1)), rel=0.02)
        assert down == pytest.approx(0.9866 / np.sqrt(2 * 512 * (layer + 1)), rel=0.02)


def test_pythias_initial_scales_are_the_published_ones():
    wide = ModelConfig(
        vocab_size=512, d_model=256, n_layers=3, n_heads=4, mlp_width=1024, mlp="gelu", init="small"
    )
    small, scaled = (
        parameters(init(dataclasses.replace(wide, init=i))) for i in ("small", "scaled")
    )
    for model, std, out_std in (
        (small, np.sqrt(2 / (5 * 256)), 2 / (3 * np.sqrt(256))),
        (scaled, 0.02, 0.02 / np.sqrt(2 * 3)),
    ):
        layers = model["layers"]
        for a in (model["embed"], model["lm_head"], layers["attention"]["q"], layers["mlp"]["up"]):
            assert np.std(a["weight"]) == pytest.approx(std, rel=0.01)
            assert np.abs(a["weight"]).max() > 3.5 * std  # not cut
        for a in (layers["attention"]["out"], layers["mlp"]["down"]):
            assert np.std(a["weight"]) == pytest.approx(out_std, rel=0.01)


def test_rope_is_scaled_on_full_attention_layers_only():
    yarn = dict(rope_scaling="yarn", rope_factor=8.0, rope_original_context=16)
    a = tokens(1, 12)
    for pattern, same in (((64,), True), ((0,), False), ((64, 64, 64, 0), False)):
        plain = init(dataclasses.replace(TINY, window_pattern=pattern, init_std=0.3))
        config = dataclasses.replace(plain.config, **yarn)
        scaled = bind(abstract_model(config), parameters(plain))
        assert np.array_equal(plain(a), scaled(a)) == same


@pytest.mark.parametrize("windows", [(0,), (3, 0)])
def test_layers_are_the_same_scanned_and_unrolled_and_so_are_the_routers_sums(windows):
    config = dataclasses.replace(VARIANTS["olmoe"], window_pattern=windows)
    model = perturbed(init(config))
    row, weights = tokens(2, 8), np.full((2, 8), 1 / 16, np.float32)
    found = []
    for layers in ("scanned", "unrolled"):
        kernels = dataclasses.replace(model.kernels, layers=layers)
        again = bind(abstract_model(config, kernels), parameters(model))
        x_BTD, sums = again.hidden_and_routing(row, weights_BT=weights)
        np.testing.assert_allclose(x_BTD, again.hidden(row), rtol=1e-5, atol=1e-5)
        assert sums.load_E.shape == sums.probability_E.shape == (4, 5)
        np.testing.assert_allclose(sums.load_E.sum(1), 2, rtol=1e-5)
        np.testing.assert_allclose(sums.probability_E.sum(1), 1, rtol=1e-5)
        found.append((x_BTD, sums))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_heads": 5}, "d_model = 32 does not divide by n_heads = 5"),
        ({"n_kv_heads": 3}, "does not divide by n_kv_heads = 3"),
        ({"embedding_rows": 96}, "less than vocab_size"),
        ({"window_pattern": (1, 2, 3)}, "do not divide"),
        ({"rope_fraction": 0.3}, "must be even"),
        ({"mlp_width": 0}, "at least 1"),
        ({"n_experts": 4}, "experts_per_token = 0: it must be between 1 and"),
        ({"n_experts": 4, "experts_per_token": 2, "bias": True}, "bias = False"),
        ({"rope_factor": 8.0}, "without rope_scaling"),
        ({"rope_scaling": "yarn", "rope_factor": 8.0}, "needs rope_original_context"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "at least 1"),
        ({"rope_scaling": "linear", "position": "alibi"}, 'needs position = "rope"'),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **changes)
