"""Meshes on four virtual CPU devices, in a process of their own."""

import subprocess
import sys
import textwrap

import pytest


def run_on_devices(code, devices=4):
    """Runs Python code where jax sees so many CPU devices; returns what it printed."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PATH": "", "HOME": "/tmp"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TRAIN = """
    import dataclasses, jax, numpy as np
    from olmo_jax.data.batch import Batch
    from olmo_jax.model.config import ModelConfig
    from olmo_jax.model.transformer import Transformer, abstract_model, parameters
    from olmo_jax.parallel.mesh import MeshConfig, build_mesh
    from olmo_jax.parallel.sharding import to_global
    from olmo_jax.train.optimizer import OptimizerConfig
    from olmo_jax.train.step import Trainer

    config = ModelConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, mlp_width=64)
    tokens = np.random.default_rng(0).integers(0, 97, (8, 17)).astype(np.int32)
    mask = np.random.default_rng(1).random((8, 16)) < 0.8
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None, None, mask, None)

    def losses(mesh_config, micro=None, kind="adamw", **optimizer):
        n = np.prod([abs(v) for v in dataclasses.asdict(mesh_config).values()])
        mesh = build_mesh(mesh_config, jax.devices()[:n] if mesh_config.fsdp != -1 else None)
        model = abstract_model(config)
        trainer = Trainer(model, OptimizerConfig(kind=kind, **optimizer), mesh, 1e-4, micro)
        state = trainer.init_state(lambda: parameters(Transformer(config, 0, model.kernels)))
        out = []
        for _ in range(4):
            args = to_global(mesh, batch), np.float32(1e-2), np.float32(1.0)
            state, metrics = trainer.step(state, *args)
            out.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return np.array(out), state
"""


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_is_the_same_on_every_mesh_and_in_micro_batches(kind):
    print(
        run_on_devices(
            TRAIN
            + f"""
    one, state = losses(MeshConfig(fsdp=1), kind={kind!r})
    assert one[-1, 0] < one[0, 0]
    for mesh in (MeshConfig(), MeshConfig(data=2), MeshConfig(tensor=2), MeshConfig(slice=2)):
        many, spread = losses(mesh, kind={kind!r})
        np.testing.assert_allclose(many, one, rtol=2e-5, err_msg=str(mesh))
        weight = spread.params["layers"]["mlp"]["up"]["weight"]
        moment = [a for a in jax.tree.leaves(spread.opt_state) if a.shape == weight.shape][0]
        assert moment.sharding == weight.sharding
        parts = mesh.tensor * (4 // (mesh.data * mesh.tensor * mesh.slice))
        assert weight.addressable_shards[0].data.size * parts == weight.size, mesh
    for micro in (2, 4):
        np.testing.assert_allclose(losses(MeshConfig(fsdp=1), micro, {kind!r})[0], one, rtol=2e-5)
    np.testing.assert_allclose(losses(MeshConfig(fsdp=2), 4, {kind!r})[0], one, rtol=2e-5)
    """
        )
    )


def test_a_router_is_balanced_over_the_global_batch_on_every_mesh_and_in_micro_batches():
    print(
        run_on_devices(
            TRAIN
            + """
    config = dataclasses.replace(
        config, n_experts=4, experts_per_token=2, load_balancing_loss=0.5, router_z_loss=0.1
    )
    one, state = losses(MeshConfig(fsdp=1))
    assert one[-1, 0] < one[0, 0]
    for mesh in (MeshConfig(), MeshConfig(data=2, expert=2), MeshConfig(tensor=2)):
        many, spread = losses(mesh)
        np.testing.assert_allclose(many, one, rtol=2e-5, err_msg=str(mesh))
        weight = spread.params["layers"]["mlp"]["up"]["weight"]
        assert weight.addressable_shards[0].data.size * 4 // mesh.data == weight.size, mesh
    for micro in (2, 4):
        np.testing.assert_allclose(losses(MeshConfig(fsdp=1), micro)[0], one, rtol=2e-5)
    config = dataclasses.replace(config, load_balancing_loss=0.0)
    other = losses(MeshConfig(fsdp=1))[0]
    assert abs(other[-1, 1] / one[-1, 1] - 1) > 1e-3  # the loss does reach the gradient
    """
        )
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(norm="layer", bias=True, parallel_residual=True, mlp="gelu_tanh", rope_fraction=0.25),
        dict(position="alibi", mlp="gelu", tie_embeddings=True),
        dict(window_pattern=(3, 0), rope_scaling="yarn", rope_factor=4.0, rope_original_context=8),
    ],
    ids=["pythia", "mpt", "olmo3 long"],
)
def test_every_family_trains_the_same_on_a_mesh(changes):
    run_on_devices(
        TRAIN
        + f"""
    config = dataclasses.replace(config, **{changes!r})
    one, _ = losses(MeshConfig(fsdp=1))
    assert one[-1, 0] < one[0, 0]
    np.testing.assert_allclose(losses(MeshConfig(tensor=2))[0], one, rtol=2e-5)
    """
    )


def test_weights_are_the_same_on_every_mesh():
    run_on_devices(
        TRAIN
        + """
    def initial(mesh_config, devices=None):
        model = abstract_model(config)
        trainer = Trainer(model, OptimizerConfig(), build_mesh(mesh_config, devices))
        return trainer.init_state(lambda: parameters(Transformer(config, 3, model.kernels))).params

    one = initial(MeshConfig(), jax.devices()[:1])
    for mesh in (MeshConfig(), MeshConfig(tensor=2), MeshConfig(data=4)):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, initial(mesh))))
    """
    )


def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers():
    run_on_devices(
        """
    import pytest
    from olmo_jax.errors import UserError
    from olmo_jax.parallel.mesh import MeshConfig, build_mesh
    assert build_mesh(MeshConfig(tensor=2)).shape["fsdp"] == 2
    with pytest.raises(UserError, match="multiple of 3 devices, and there are 4"):
        build_mesh(MeshConfig(tensor=3))
    with pytest.raises(UserError, match="there are 4"):
        build_mesh(MeshConfig(fsdp=2))
    with pytest.raises(UserError, match="at most one is -1"):
        build_mesh(MeshConfig(data=-1))
    with pytest.raises(UserError, match="Mesh.context = 2: this version takes 1 only"):
        build_mesh(MeshConfig(context=2))
    """
    )
