"""Which form of each operation runs, decided once from the devices of the mesh.

The choice is a frozen value that travels with the model, so that a plan made on a CPU for a TPU
picks what the TPU would run.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kernels:
    """The chosen forms. `notes` says, for a person, why a faster one was not taken."""

    linear: Literal["flat", "kept"] = "flat"
    """"flat" folds batch and time into one axis before a product; "kept" leaves axes apart."""
    attention: Literal["xla"] = "xla"
    """"xla": einsum, softmax, einsum, with the (T, S) scores in memory."""
    cross_entropy_tokens: int = 512
    """Tokens whose logits exist at once in the fused head and loss."""
    notes: tuple[str, ...] = ()


def pick_kernels(platform: str) -> Kernels:
    """The forms for a platform ("cpu", "gpu", "cuda", "tpu"), as `mesh.devices[...].platform`."""
    if platform == "cpu":
        return Kernels()
    return Kernels(
        linear="kept",
        cross_entropy_tokens=2048,
        notes=(f"attention: no fused form for {platform} yet, taking the XLA form",),
    )
