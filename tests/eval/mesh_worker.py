"""Scores on meshes of eight virtual devices, each against one device; see test_in_loop.py."""

import sys

import jax
import numpy as np

from olmo_jax.eval.scoring import Pair, Scorer
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import bind, init, parameter_axes, parameters
from olmo_jax.parallel.mesh import MeshConfig, build_mesh
from olmo_jax.parallel.sharding import weight_sharding

SHAPE = dict(vocab_size=96, d_model=32, n_layers=2, n_heads=8, mlp_width=64, context_length=64)
MODELS = {
    "window": ModelConfig(**SHAPE, n_kv_heads=4, window_pattern=(5, 0)),
    "alibi": ModelConfig(**SHAPE, position="alibi"),
    "experts": ModelConfig(**SHAPE, n_experts=8, experts_per_token=2),
}


def main() -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(20):
        context = tuple(rng.integers(0, 96, rng.integers(5, 30)).tolist())
        pairs += [Pair(context, tuple(rng.integers(0, 96, 4).tolist())) for _ in range(3)]
    for case in sys.argv[1:]:
        name, _, axes = case.partition(":")
        model = init(MODELS[name], seed=2)
        alone = dict(Scorer(model, tokens_per_batch=256)(pairs))
        sizes = {axis: int(n) for axis, n in (part.split("=") for part in axes.split(","))}
        mesh = build_mesh(MeshConfig(**{"fsdp": 1} | sizes))
        cut = jax.tree.map(
            lambda a, axes, mesh=mesh: jax.device_put(a, weight_sharding(mesh, axes, a.shape)),
            parameters(model),
            parameter_axes(model),
        )
        found = dict(Scorer(bind(model, cut), mesh=mesh, tokens_per_batch=256)(pairs))
        for i in alone:
            np.testing.assert_allclose(found[i].logprobs, alone[i].logprobs, atol=2e-5)
            assert found[i].is_greedy == alone[i].is_greedy
        print("equal", case, flush=True)


if __name__ == "__main__":
    main()
