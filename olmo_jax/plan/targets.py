"""Machines that are not there: a name such as v5p-128 or h100-64 to devices that XLA compiles for.

TPU devices come from libtpu's topologies, GPUs from a description of the chip; no device is opened.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

from olmo_jax.errors import UserError
from olmo_jax.plan.chips import CHIPS, Chip

_TPU = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "TPU7x"}
_COUNTED_IN_CORES = ("v4", "v5p", "tpu7x")  # Google's names of these count two cores a chip
_GPUS_A_NODE = 8

# Slices that Google Cloud offers, by chips. Two dimensions: v5e, v6e; three: v4, v5p, TPU7x.
_SHAPES_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_SHAPES_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
}
_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 4096, "v6e": 256, "tpu7x": 4096}


@dataclass(frozen=True)
class Target:
    """One machine: `slices` equal parts (TPU slices, or GPU nodes) of `chips / slices` chips."""

    name: str
    """As the user gave it, in lower case."""
    chip: Chip
    chips: int
    """Chips in all."""
    slices: int = 1
    """TPU slices joined by the data-centre network."""
    shape: str = ""
    """A slice's shape, such as 4x4x4; a GPU cluster's, nodes x GPUs."""

    @property
    def platform(self) -> str:
        """What JAX lowers for: "tpu" or "cuda"."""
        return "tpu" if self.chip.name in _TPU else "cuda"

    @property
    def devices(self) -> int:
        """JAX devices in all (a TPU7x chip is two)."""
        return self.chips * self.chip.devices

    @property
    def together(self) -> int:
        """JAX devices that one slice (TPU) or node (GPU) has, joined by the fast links."""
        if self.platform == "cuda":
            return min(_GPUS_A_NODE, self.devices)
        return self.devices // self.slices


def parse_target(name: str) -> Target:
    """The machine of a name: v5p-128, v6e-256, 2xv5e-256, tpu7x-64, h100-64.

    v4, v5p and tpu7x count cores, two a chip (v5p-128 is 64 chips), as Google's names do; v5e, v6e
    and GPUs count chips. `Nx` before it is N slices. UserError for anything else, with what there
    is.
    """
    text = name.strip().lower()
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9]*)-(\d+)", text)
    if not match or match[2] not in CHIPS:
        raise UserError(
            f"target {name!r}: give CHIP-COUNT such as v5p-128, h100-64, or 2xv5e-256 for two "
            f"slices; chips: {', '.join(CHIPS)}"
        )
    slices, kind, count = int(match[1] or 1), match[2], int(match[3])
    chip = CHIPS[kind]
    if kind not in _TPU:
        return _gpus(text, chip, slices, count)
    per_chip = 2 if kind in _COUNTED_IN_CORES else 1
    shapes = _SHAPES_2D if kind in ("v5e", "v6e") else _SHAPES_3D
    sizes = {n * per_chip: n for n in shapes if n <= _LARGEST[kind]}
    if count not in sizes or slices < 1:
        unit = "cores, two a chip" if per_chip == 2 else "chips"
        raise UserError(
            f"target {name!r}: {kind} comes with {', '.join(map(str, sizes))} ({unit}); more are "
            f"several slices, such as 2x{kind}-{max(sizes)}"
        )
    chips = sizes[count]
    return Target(text, chip, chips * slices, slices, shapes[chips])


def _gpus(name: str, chip: Chip, slices: int, count: int) -> Target:
    if slices != 1:
        raise UserError(f"target {name!r}: GPUs have no slices; give {chip.name}-{slices * count}")
    if not 1 <= count <= 256 or (count > _GPUS_A_NODE and count % _GPUS_A_NODE):
        raise UserError(
            f"target {name!r}: give 1 to 8 GPUs, or whole nodes of 8 up to 256 "
            f"(such as {chip.name}-64)"
        )
    nodes = max(1, count // _GPUS_A_NODE)
    return Target(name, chip, count, 1, f"{nodes}x{count // nodes}")


def prepare_process() -> None:
    """Settings that must stand before jax is imported: its own backend is the CPU, and neither
    libtpu nor CUDA looks for a device. What the user has set stays."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several compilers at once
    # libtpu complains of a machine that it cannot find; any answer will do, since topologies name
    # their own.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def target_devices(target: Target) -> list[Any]:
    """The target's JAX devices, to compile for. UserError where the compiler is not installed."""
    from jax.experimental import topologies

    require_compiler(target)
    if target.platform == "cuda":
        return topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x{target.shape}",
            target_config=_gpu_description(target.chip),
        ).devices
    options: dict[str, Any] = {}
    if target.slices > 1:
        options["num_slices"] = target.slices
    if target.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the real machine
    if target.chips == target.slices:  # libtpu takes four chips for a host unless told
        options["chips_per_host_bounds"] = [1, 1, 1]
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{_TPU[target.chip.name]}:{target.shape}", **options
    ).devices


def require_compiler(target: Target) -> None:
    """UserError, naming the extra, where the target's compiler is not installed."""
    module = "jax_plugins.xla_cuda13" if target.platform == "cuda" else "libtpu"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even a jax_plugins
        found = False
    if not found:
        raise UserError(
            f"target {target.name} needs {module.rpartition('.')[2]}, which is not installed; run: "
            "pip install 'olmo-jax[aot]' (the compilers alone; no device is needed)"
        )


# --- what XLA's GPU compiler is told --------------------------------------------------------------


@dataclass(frozen=True)
class _Gpu:
    """The fields of XLA's GpuTargetConfig in which chips differ; NVIDIA's numbers of the SXM
    boards, as a device query gives them."""

    kind: str
    capability: str
    cores: int
    fpus: int
    shared_kib: int
    """Shared memory a core; a block may have 1 KiB less."""
    l2: int
    ghz: float
    memory: int
    bandwidth: int


_HOPPER = "major: 9 feature_extension: ACCELERATED_FEATURES"
_GPUS = {
    "a100": _Gpu(
        "NVIDIA A100-SXM4-80GB",
        "major: 8",
        108,
        64,
        164,
        41943040,
        1.41,
        85100068864,
        2039040000000,
    ),
    "h100": _Gpu(
        "NVIDIA H100 80GB HBM3", _HOPPER, 132, 128, 228, 52428800, 1.98, 84929347584, 3352320000000
    ),
    "h200": _Gpu(
        "NVIDIA H200", _HOPPER, 132, 128, 228, 52428800, 1.98, 151397597184, 4800000000000
    ),
    "b200": _Gpu(
        "NVIDIA B200",
        "major: 10 feature_extension: ACCELERATED_FEATURES",
        148,
        128,
        228,
        132644864,
        1.965,
        191514411008,
        7672320000000,
    ),
}


def _gpu_description(chip: Chip) -> str:
    """XLA's GpuTargetConfig as text."""
    gpu = _GPUS[chip.name]
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: {gpu.shared_kib * 1024}
  threads_per_core_limit: 2048  core_count: {gpu.cores}  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}  l2_cache_size: {gpu.l2}  clock_rate_ghz: {gpu.ghz}
  device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: {(gpu.shared_kib - 1) * 1024}
  cuda_compute_capability {{ {gpu.capability} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 1 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{gpu.kind}"
"""
