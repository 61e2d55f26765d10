"""Training steps of released models at small depth, compiled: fused kernels, no whole scores."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from programs import array, compiled, kernels_in, mesh_of, square_buffers

from olmo_jax.data.batch import Batch
from olmo_jax.model.presets import preset
from olmo_jax.model.transformer import abstract_model, kernels_for
from olmo_jax.parallel.sharding import batch_sharding
from olmo_jax.train.optimizer import OptimizerConfig
from olmo_jax.train.step import Trainer

pytestmark = pytest.mark.aot
T = 8192


def step(name: str, target: str, layers: int, T: int = T, forms=None, **axes):
    """The program of a step on packed documents, a row a device, and its temporaries."""
    mesh = mesh_of(target, **axes)
    config = replace(preset(name), n_layers=layers, compute_dtype="bfloat16", remat="full")
    kernels = kernels_for(config, mesh.devices.flat[0], devices=mesh.size)
    kernels = replace(kernels, **(forms or {}))
    trainer = Trainer(abstract_model(config, kernels), OptimizerConfig(), mesh)
    rows = batch_sharding(mesh).spec

    def rows_of(dtype):
        return array(mesh, (mesh.size, T), dtype, *rows)

    ids = [rows_of(jnp.int32) for _ in range(4)]
    scalar = array(mesh, (), jnp.float32)
    batch = Batch(*ids, rows_of(jnp.bool_), None)
    return compiled(trainer.step, trainer.abstract_state, batch, scalar, scalar)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("v5p-16", ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]),
        ("h100-8", ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]),
    ],
)
def test_olmo3_with_windows_and_documents(target, expected):
    """Two groups of three windowed layers and a full one, scanned."""
    text, temporaries = step("olmo3_7b", target, layers=8)
    print(f"{target}: {temporaries / 1e9:.2f} GB of temporaries")
    assert kernels_in(text) == expected
    assert not square_buffers(text, T)


def test_olmoe_multiplies_only_by_the_experts_that_tokens_visit():
    """On CUDA XLA's ragged_dot would lay every token out beside every expert: (M, E · D)."""
    text, temporaries = step("olmoe_1b_7b_0924", "h100-8", layers=2, T=4096)
    print(f"{temporaries / 1e9:.2f} GB of temporaries")
    assert "__cudnn$fmhaSoftmax" in kernels_in(text)
    assert temporaries < 10e9
