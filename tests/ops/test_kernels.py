"""Which form runs where, and what is said where it is not the fastest."""

import pytest

from olmo_jax.ops.kernels import pick_kernels


def test_a_cpu_takes_its_own_forms():
    kernels = pick_kernels("cpu", "cpu")
    assert (kernels.attention, kernels.experts, kernels.notes) == ("blocked", "grouped", ())


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_every_tpu_has_its_blocks(kind):
    kernels = pick_kernels("tpu", kind)
    assert (kernels.attention, kernels.notes) == ("splash", ())
    assert kernels.splash.q == 1024


def test_blocks_shrink_with_what_a_position_takes():
    assert pick_kernels("tpu", "TPU v5", head_width=256).splash.q == 512
    assert pick_kernels("tpu", "TPU v5", compute_dtype="float32").splash.kv_back == 512
    assert pick_kernels("tpu", "TPU v5", head_width=64) == pick_kernels("tpu", "TPU v5p")


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("NVIDIA A100-SXM4-80GB", "cudnn_unpacked"),
        ("NVIDIA H100 80GB HBM3", "cudnn"),
        ("NVIDIA H200", "cudnn"),
        ("NVIDIA B200", "cudnn"),
    ],
)
def test_every_gpu_of_the_table_is_fused(kind, form):
    kernels = pick_kernels("gpu", kind)
    assert kernels.attention == form
    assert bool(kernels.notes) == (form == "cudnn_unpacked")
    assert kernels.layers == "unrolled"
    assert pick_kernels("gpu", kind, devices=8).layers == "scanned"


@pytest.mark.parametrize(
    ("device", "model", "why"),
    [
        (("gpu", "NVIDIA H100 80GB HBM3"), {"compute_dtype": "float32"}, "bfloat16, not float32"),
        (("gpu", "NVIDIA H100 80GB HBM3"), {"head_width": 84}, "not 84"),
        (("gpu", "NVIDIA A100-SXM4-80GB"), {"head_width": 256}, "up to 128"),
        (("gpu", "NVIDIA H200"), {"alibi": True}, "ALiBi"),
        (("gpu", "AMD Instinct MI300X"), {}, "AMD Instinct MI300X is none of A100"),
        (("tpu", "TPU v5"), {"alibi": True}, "ALiBi"),
    ],
)
def test_what_no_fused_kernel_does_is_blocked_and_says_why(device, model, why):
    kernels = pick_kernels(*device, **model)
    assert kernels.attention == "blocked" and why in kernels.notes[0]


def test_an_unknown_tpu_says_that_its_blocks_are_a_guess():
    kernels = pick_kernels("tpu", "TPU v9")
    assert kernels.attention == "splash" and "TPU v9" in kernels.notes[0]
