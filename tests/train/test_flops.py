"""FLOPs a token by hand, and the peaks by JAX's names for the devices."""

import jax
import pytest

from olmo_jax.model.config import ModelConfig
from olmo_jax.train.flops import flops_per_token, mfu, peak_flops

SHAPE = dict(
    vocab_size=1000, embedding_rows=1024, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2,
    mlp_width=96,
)  # fmt: skip
BLOCKS = 4 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64 + 64 + 32) + 64


def test_by_hand():
    expected = 6 * (BLOCKS + 1024 * 64) + 4 * 12 * 4 * 16 * 128
    assert flops_per_token(ModelConfig(**SHAPE), 128) == expected


def test_a_window_attends_to_no_more_than_itself():
    config = ModelConfig(**SHAPE, window_pattern=(32, 0))
    expected = 6 * (BLOCKS + 1024 * 64) + 12 * 4 * 16 * (2 * 32 + 2 * 128)
    assert flops_per_token(config, 128) == expected
    assert flops_per_token(config, 16) == flops_per_token(ModelConfig(**SHAPE), 16)


def test_a_tied_head_costs_what_an_untied_one_does():
    tied = ModelConfig(**SHAPE, tie_embeddings=True)
    assert flops_per_token(tied, 128) == flops_per_token(ModelConfig(**SHAPE), 128)


def test_experts_count_when_visited():
    moe = dict(SHAPE, n_experts=8)
    one, two = (flops_per_token(ModelConfig(**moe, experts_per_token=k), 128) for k in (1, 2))
    assert two - one == 6 * 4 * 3 * 64 * 96
    dense = flops_per_token(ModelConfig(**SHAPE), 128)
    assert one - dense == 6 * 4 * 64 * 8  # the router, for all of its experts


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459),
        ("TPU v6 lite", 918), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989), ("NVIDIA B200", 2250),
    ],
)  # fmt: skip
def test_peaks(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


def test_an_unknown_device_has_no_peak():
    assert peak_flops(jax.devices("cpu")[0].device_kind) is None
    assert mfu(1e5, 1e9, "cpu", 1) is None


def test_mfu_is_a_share_of_all_devices():
    assert mfu(1e5, 1e9, "TPU v4", 4) == pytest.approx(1e14 / (4 * 275e12))
    # A TPU7x chip, 2,307 TFLOP/s, is two JAX devices.
    assert mfu(2307e3, 1e9, "TPU7x", 2) == pytest.approx(1.0)
