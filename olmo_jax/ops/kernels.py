"""Which form of each operation runs, decided once from the devices of the mesh.

The choice is a frozen value that travels with the model, so that a plan made on a CPU for a TPU
picks what the TPU would run.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kernels:
    """The chosen forms. `notes` says, for a person, why a faster one was not taken."""

    linear: Literal["flat", "kept"] = "kept"
    """"flat" folds batch and time into one axis before a product; "kept" leaves axes apart."""
    attention: Literal["blocked", "reference"] = "blocked"
    """"blocked": only what the mask can show, a block of queries at a time; "reference": einsum,
    softmax, einsum, with the whole (T, S) scores in memory."""
    context: Literal["gathered", "ring"] = "gathered"
    """How keys and values reach other parts of a sequence, see `MeshConfig.context_form`."""
    experts: Literal["grouped", "ragged", "reference"] = "ragged"
    """"grouped": blocks of tokens of one expert in a loop; "ragged": XLA's own grouped product;
    "reference": every expert on every token."""
    layers: Literal["scanned", "unrolled"] = "scanned"
    """"scanned" compiles one layer and runs it L times; "unrolled" compiles them all."""
    cross_entropy_tokens: int = 2048
    """Tokens whose logits exist at once in the fused head and loss."""
    notes: tuple[str, ...] = ()


def pick_kernels(platform: str) -> Kernels:
    """The forms for a platform ("cpu", "gpu", "cuda", "tpu"), as `mesh.devices[...].platform`."""
    if platform == "cpu":
        return Kernels(
            linear="flat", experts="grouped", layers="unrolled", cross_entropy_tokens=1024
        )
    return Kernels(notes=(f"attention: no fused form for {platform} yet, taking the blocked form",))
