"""Meshes on eight virtual CPU devices, in processes of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from olmo_jax.errors import UserError
from olmo_jax.parallel.mesh import AXES, MeshConfig, _arranged, build_mesh

HERE = Path(__file__).parent


def on_devices(*arguments, devices=8):
    """Runs Python where jax sees so many CPU devices; returns what it printed."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def trains_as_on_one_device(*cases, steps):
    """Losses of all steps, and each tensor's first gradient, are one device's to 1e-5."""
    printed = on_devices(str(HERE / "mesh_worker.py"), str(steps), *cases)
    assert printed.split("\n")[:-1] == [f"same {case}" for case in cases]


def test_training_over_every_axis_is_training_on_one_device():
    trains_as_on_one_device(
        "olmo3:fsdp=2,context=2,tensor=2,ring", "olmoe:slice=2,data=2,expert=2", steps=3
    )


ALONE = ["slice=8", "data=8", "fsdp=8", "context=8", "context=8,ring", "tensor=8"]
MIXED = [
    "data=2,fsdp=4",
    "fsdp=2,tensor=4",
    "fsdp=2,context=4",
    "fsdp=2,context=4,ring",
    "slice=2,fsdp=4",
]
EXPERTS = [
    "expert=8",
    "expert=4,fsdp=2",
    "expert=2,context=2,tensor=2",
    "expert=8,ragged",
    "expert=4,fsdp=2,ragged",
    "expert=2,context=2,tensor=2,ragged",
]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["olmo2", "olmo3", "olmoe"])
def test_training_on_every_mesh_is_training_on_one_device(model):
    meshes = ALONE + MIXED + (EXPERTS if model == "olmoe" else [])
    trains_as_on_one_device(*(f"{model}:{mesh}" for mesh in meshes), steps=10)


@pytest.mark.slow
def test_every_family_trains_the_same_on_a_mesh():
    trains_as_on_one_device(
        "pythia:tensor=2,fsdp=2",
        "mpt:tensor=2,context=2,fsdp=2,ring",
        "olmo3-long:context=2,fsdp=2",
        "olmo2-remat:context=4,fsdp=2,ring",
        steps=3,
    )


@pytest.mark.slow
def test_micro_batches_and_muon_give_the_same_on_a_mesh():
    on_devices(
        "-c",
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(HERE)!r})
        from mesh_worker import *
        for model, kind in (("olmo2", "muon"), ("olmoe", "adamw")):
            one, _, _ = train(model, MeshConfig(fsdp=1), 4, kind=kind)
            for mesh, micro in (("fsdp=1", 2), ("fsdp=2,tensor=2", 4)):
                found, _, state = train(model, parse(mesh), 4, micro, kind)
                np.testing.assert_allclose(found, one, rtol=2e-5, err_msg=f"{{model}} {{mesh}}")
            weight = state.params["layers"]["mlp"]["up"]["weight"]
            moment = [a for a in jax.tree.leaves(state.opt_state) if a.shape == weight.shape][0]
            assert moment.sharding == weight.sharding
            assert weight.addressable_shards[0].data.size * 4 == weight.size
        """),
    )


def test_attention_of_sequences_cut_over_devices_is_the_references():
    on_devices(str(HERE / "attention_worker.py"))


def test_experts_cut_over_devices_drop_no_token():
    on_devices(str(HERE / "exchange_worker.py"))


def test_what_travels_between_devices():
    on_devices(str(HERE / "travel_worker.py"))


def test_weights_are_the_same_on_every_mesh():
    on_devices(
        "-c",
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(HERE)!r})
        from mesh_worker import *

        def initial(text, devices):
            model, mesh = abstract_model(OLMO2), build_mesh(parse(text), jax.devices()[:devices])
            make = lambda: parameters(Transformer(OLMO2, 3, model.kernels))
            return Trainer(model, OptimizerConfig(), mesh).init_state(make).params

        one, many = initial("data=1", 1), initial("fsdp=4,tensor=2", 8)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, many)))
        """),
    )


@pytest.mark.parametrize(
    "mesh, message",
    [
        (dict(tensor=3), "multiple of 3 devices, and there are 8"),
        (dict(fsdp=2), "there are 8"),
        (dict(data=-1), "at most one is -1"),
        (dict(context=0), "at least 1"),
    ],
)
def test_a_mesh_that_is_none_is_refused_with_the_numbers(mesh, message):
    with pytest.raises(UserError, match=message):
        build_mesh(MeshConfig(**mesh), jax.devices()[:1] * 8)


def test_any_axis_may_go_from_host_to_host_of_a_gpu_cluster():
    """jax calls hosts slices there, too; the last axes stay within one."""
    devices = [
        SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", id=i, slice_index=i // 8)
        for i in range(16)
    ]
    for shape in ((1, 1, 16, 1, 1, 1), (2, 1, 8, 1, 1, 1), (1, 4, 1, 1, 4, 1)):
        arranged = _arranged(dict(zip(AXES, shape, strict=True)), devices)
        assert arranged.shape == shape
        assert [device.id for device in arranged.flat] == list(range(16))
