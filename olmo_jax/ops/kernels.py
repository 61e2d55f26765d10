"""Which form of each operation runs, decided once from the devices of the mesh.

The choice is a frozen value that travels with the model, so that a plan made on a CPU for a TPU
picks what the TPU would run.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class SplashBlocks:
    """Positions that TPU's attention kernels take at once; less where they do not divide T."""

    q: int = 512
    """Queries in the forward pass."""
    kv: int = 512
    """Keys brought into vector memory at once, forward."""
    kv_compute: int = 512
    """Keys multiplied at once, forward."""
    q_back: int = 512
    """Queries in the backward pass."""
    kv_back: int = 512
    """Keys brought in at once, backward."""
    kv_back_compute: int = 512
    """Keys multiplied at once, backward."""
    fused: bool = False
    """One backward kernel instead of two: five products for seven, but S / kv_back copies of the
    queries' gradient in memory."""


@dataclass(frozen=True)
class Kernels:
    """The chosen forms. `notes` says, for a person, why a faster one was not taken."""

    linear: Literal["flat", "kept"] = "kept"
    """"flat" folds batch and time into one axis before a product; "kept" leaves axes apart."""
    attention: Literal["blocked", "reference", "splash", "cudnn", "cudnn_unpacked"] = "blocked"
    """"blocked": only what the mask can show, a block of queries at a time; "reference": einsum,
    softmax, einsum, with the whole (T, S) scores in memory; "splash": TPU's fused kernels; "cudnn":
    NVIDIA's; "cudnn_unpacked": NVIDIA's, but rows of several documents take "blocked"."""
    splash: SplashBlocks | None = None
    """Block sizes of "splash"."""
    context: Literal["gathered", "ring"] = "gathered"
    """How keys and values reach other parts of a sequence, see `MeshConfig.context_form`."""
    experts: Literal["grouped", "ragged", "reference"] = "ragged"
    """"grouped": blocks of tokens of one expert in a loop; "ragged": XLA's own grouped product;
    "reference": every expert on every token."""
    exchange: Literal["ragged", "padded"] = "ragged"
    """How tokens reach experts on other devices. "ragged": what there is to send; "padded": blocks
    that hold the worst case (jax has no ragged exchange for CPU)."""
    layers: Literal["scanned", "unrolled"] = "scanned"
    """"scanned" compiles one layer and runs it L times; "unrolled" compiles them all."""
    cross_entropy_tokens: int = 2048
    """Tokens whose logits exist at once in the fused head and loss."""
    notes: tuple[str, ...] = ()


# Splash block sizes by `device.device_kind`. Each fits the compiler's default scoped vector memory
# at head width 128 in bfloat16, with windows and documents (tests/aot compiles
# them): larger ones need --xla_tpu_scoped_vmem_limit_kib, and a run would not start without it.
#
# fused: MaxText's v5p recipe (deepseek3-671b) has it off, its TPU7x recipes on. Elsewhere off: at T
# 8192 with 32 heads its copies of the gradient take the kernels' temporaries from 279 to 689 MB
# (v5p, blocks of 1024), from 203 to 605 MB (v5e).
_SPLASH = {
    # 1024 is the largest that fits; MaxText's default is 512.
    "TPU v4": SplashBlocks(1024, 1024, 1024, 1024, 1024, 1024),
    # MaxText's v5p recipes: 2048 with a limit of 65472 KiB; 1024 is the largest that fits without.
    "TPU v5": SplashBlocks(1024, 1024, 1024, 1024, 1024, 1024),
    # MaxText's v5e recipes: q 1024, backward q 1024, dq 2048; 1024 is the largest that fits.
    "TPU v5 lite": SplashBlocks(1024, 1024, 1024, 1024, 1024, 1024),
    # MaxText's Trillium recipes: q 1024, backward q 2048, keys its default of 512.
    "TPU v6 lite": SplashBlocks(1024, 512, 512, 2048, 512, 512),
    # MaxText's TPU7x recipes: 1024, backward 2048 with a larger limit; 1024 fits without.
    "TPU7x": SplashBlocks(1024, 1024, 512, 1024, 1024, 1024, fused=True),
}
_KINDS = {"TPU v5p": "TPU v5", "TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}

# Compute capability by a part of `device.device_kind`. What cuDNN's fused attention takes (jax's
# checks in jax/_src/cudnn/fused_attention_stablehlo.py): bfloat16, and
#
#                       A100 (8.0)          H100, H200 (9.0), B200 (10.0)
#   head width          8 to 128, by 8      8 to 256, by 8
#   causal, window      yes                 yes
#   rows of documents   blocked form        yes, packed
_CUDA = {"A100": 8.0, "H100": 9.0, "H200": 9.0, "B200": 10.0}


def pick_kernels(
    platform: str,
    device_kind: str = "",
    *,
    head_width: int = 128,
    alibi: bool = False,
    compute_dtype: str = "bfloat16",
    devices: int = 1,
) -> Kernels:
    """The forms for a mesh of so many devices (of `.platform`, `.device_kind`), and what the
    model's attention is."""
    if platform == "cpu":
        return Kernels(
            linear="flat",
            experts="grouped",
            exchange="padded",
            layers="unrolled",
            cross_entropy_tokens=1024,
        )
    if platform == "tpu":
        return _tpu(device_kind, head_width, alibi, compute_dtype)
    # XLA's ragged_dot on CUDA multiplies every token with every expert: OLMoE's step at T 4096, a
    # row an H100, had 42 GB of temporaries (3.1 on a v5p, whose compiler has a kernel for it).
    picked = replace(_gpu(device_kind, head_width, alibi, compute_dtype), experts="grouped")
    # A scan copies what its turns keep into stacks, and out of them again: OLMo-2-1B's step on one
    # H200 took 0.160 s, and takes 0.140. Of a sharded model an unrolled program gathers ahead:
    # OLMo-2-7B on 64 H100 takes 11.5 GiB of temporaries for 4.7, and 124 s of compiling for 25.
    return replace(picked, layers="unrolled") if devices == 1 else picked


def _blocked(why: str) -> Kernels:
    return Kernels(notes=(f"attention: blocked, since {why}",))


def _tpu(device_kind: str, head_width: int, alibi: bool, compute_dtype: str) -> Kernels:
    if alibi:
        return _blocked("splash does not add ALiBi's slopes")
    kind = _KINDS.get(device_kind, device_kind)
    blocks, notes = _SPLASH.get(kind), tuple[str, ...]()
    if blocks is None:
        blocks = SplashBlocks()
        notes = (f"attention: blocks of 512, since none are known for {device_kind or 'this TPU'}",)
    # Vector memory is what bounds a block: its bytes stay those of 128 x bfloat16.
    shrink = -(-head_width // 128) * (2 if compute_dtype == "float32" else 1)
    if shrink > 1:
        sizes: dict[str, Any] = {name: max(128, n // shrink) for name, n in _sizes(blocks).items()}
        blocks = replace(blocks, **sizes)
    # A chunk of N tokens makes 6 N D V FLOPs of the head, and moves its weights and their float32
    # gradient, 12 D V bytes: N is to be about twice the chip's FLOPs a byte (v5p 166, v5e 241; v6e
    # 560, TPU7x 312). Half of it saves 0.3 GB at a vocabulary of 100,352.
    tokens = 1024 if kind in ("TPU v6 lite", "TPU7x") else 512
    return Kernels(attention="splash", splash=blocks, cross_entropy_tokens=tokens, notes=notes)


def _sizes(blocks: SplashBlocks) -> dict[str, Any]:
    return {name: size for name, size in asdict(blocks).items() if name != "fused"}


def _gpu(device_kind: str, head_width: int, alibi: bool, compute_dtype: str) -> Kernels:
    if alibi:
        return _blocked("cuDNN is not asked for ALiBi's slopes")
    capability = next((c for name, c in _CUDA.items() if name in device_kind), None)
    if capability is None:
        return _blocked(f"{device_kind or 'this GPU'} is none of {', '.join(_CUDA)}")
    if compute_dtype != "bfloat16":
        return _blocked(f"cuDNN's fused attention takes bfloat16, not {compute_dtype}")
    widest = 256 if capability >= 9 else 128
    if head_width % 8 or head_width > widest:
        return _blocked(
            f"cuDNN's fused attention takes head widths that are multiples of 8 up to {widest} on "
            f"{device_kind}, not {head_width}"
        )
    if capability >= 9:
        return Kernels(attention="cudnn")
    note = f"attention: rows of several documents take the blocked form: {device_kind} cannot pack"
    return Kernels(attention="cudnn_unpacked", notes=(note,))
