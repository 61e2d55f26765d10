"""FLOPs a token, chips' peak rates, and the share of the peak that is used (MFU).

An estimate by formula for progress bars and comparisons; `plan` counts a compiled program.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmo_jax.model.config import ModelConfig

# Dense bfloat16 peak in FLOP/s of one *JAX device*, by `device.device_kind`, from the makers'
# sheets. Only exact names: an H100 PCIe or NVL is slower than the SXM, and no figure is better
# than a wrong one.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two JAX devices
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def flops_per_token(model_config: "ModelConfig", sequence_length: int) -> int:
    """FLOPs of forward and backward for one token, by the field's habit (PaLM, appendix B).

    6 * (parameters without the embedding table) + 12 * heads * head_dim * min(window, T) a layer.
    The attention term counts all T * T pairs, not the causal half; recomputation (remat) counts
    nothing. A tied head is a product like any other and counts; so do the router and the experts
    that are visited, not the others.
    """
    attended = sum(
        min(window, sequence_length) if window else sequence_length
        for window in model_config.windows
    )
    weights = model_config.parameter_count(embedding=False, active=True)
    return 6 * weights + 12 * model_config.n_heads * model_config.head_width * attended


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of one JAX device in FLOP/s; None where it is not known (every CPU).

    `device_kind` is JAX's own name, `jax.devices()[0].device_kind`.
    """
    return _PEAK_FLOPS.get(device_kind)


def mfu(
    tokens_per_second: float, flops_per_token: float, device_kind: str, device_count: int
) -> float | None:
    """Model FLOPs utilization: the share (0 to 1) of the devices' peak; None if not known."""
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * device_count)
