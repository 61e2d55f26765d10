"""Cached, batched decoding on the device gives the tokens of the uncached forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import olmo_jax
from olmo_jax.generate import Request, generate_batch
from olmo_jax.model.config import ModelConfig

pytestmark = pytest.mark.device


@pytest.mark.parametrize("window", [(0,), (16, 0)])
def test_greedy_tokens_are_the_uncached_ones(window):
    with jax.default_matmul_precision("highest"):
        config = ModelConfig(
            vocab_size=256, d_model=64, n_layers=4, n_heads=4, mlp_width=128,
            window_pattern=window, context_length=128, compute_dtype="float32",
        )  # fmt: skip
        model = olmo_jax.init(config, seed=1)
        prompts = [tuple(np.random.default_rng(n).integers(1, 256, n + 3)) for n in range(5)]
        got = generate_batch(model, [Request(tuple(map(int, p)), 40) for p in prompts])
        forward = jax.jit(model.__call__)
        for prompt, completion in zip(prompts, got, strict=True):
            row = np.zeros((1, 128), np.int32)
            row[0, : len(prompt)] = prompt
            for n in range(len(prompt), len(prompt) + 40):
                row[0, n] = int(jnp.argmax(forward(row)[0, n - 1]))
            assert list(completion.token_ids) == row[0, len(prompt) : len(prompt) + 40].tolist()
