"""The compiler flags of a training run: which, why, and where each was found to help.

Chosen by backend, version and chip, joined with the user's, and checked before a device is touched:
XLA aborts the process at a flag that it does not know. `plan` hands the same ones to a single
compilation, for a machine that is not there (`chosen`).
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from olmo_jax.errors import UserError
from olmo_jax.parallel.local import gpus
from olmo_jax.parallel.processes import on_tpu_host

Platform = Literal["cpu", "gpu", "tpu"]
VARIABLES: dict[Platform, str] = {
    "cpu": "XLA_FLAGS",
    "gpu": "XLA_FLAGS",
    "tpu": "LIBTPU_INIT_ARGS",
}


@dataclass(frozen=True)
class Flag:
    """`--name=value`, for a person too."""

    name: str
    value: str
    reason: str
    source: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


_MAXTEXT = "MaxText 0.2.5"
_OVERLAP = "collectives run while the layers before and after compute"
_PIPELINE = "a layer's collective runs beside its neighbour's products inside the scan"
# KiB of vector memory that a kernel may use; 16 MiB by default, and splash attention's large blocks
# need more.
_SCOPED_VMEM = {
    "v5p": ("65472", "trainers/diloco/scripts/run_spmd_streaming_dlco_moe_c4.sh"),
    "v6e": ("98304", "configs/tpu/v6e/llama2_7b_4096.sh"),
    "tpu7x": ("65536", "trainers/pre_train/scripts/olmo/run_olmo3_7b_stage1.sh"),
}


def flags_for(
    platform: Platform, jaxlib: str, chip: str | None = None, slices: int = 1
) -> list[Flag]:
    """Our choice. `jaxlib` is its version; `chip` is "v5p", "v6e", … (None: not known); `slices`
    are TPU slices."""
    if platform == "tpu":
        return _tpu_flags(chip, slices)
    return _gpu_flags(jaxlib) if platform == "gpu" else []


def _gpu_flags(jaxlib: str) -> list[Flag]:
    source = f"{_MAXTEXT}, configs/gpu/a3/llama_3.1_405b/128vm.sh"
    flags = [
        Flag("xla_gpu_enable_latency_hiding_scheduler", "true", _OVERLAP, source),
        Flag(
            "xla_gpu_enable_triton_gemm",
            "false",
            "cuBLAS is the faster one for a transformer's large products",
            source,
        ),
        Flag(
            "xla_gpu_enable_highest_priority_async_stream",
            "true",
            "collectives get their share of the GPU beside products",
            source,
        ),
        Flag(
            "xla_gpu_enable_while_loop_double_buffering",
            "true",
            "no copies between the turns of the scan over layers",
            source,
        ),
        Flag(
            "xla_gpu_enable_dynamic_slice_fusion",
            "false",
            "a product that is also kept for the backward pass is made once, not twice (by jaxlib "
            "0.11.2 OLMo-2-1B's step without remat has 1.24 times its products otherwise)",
            "compiled programs, counted",
        ),
    ]
    for operation, combined in (
        ("all_reduce", 2**30),
        ("all_gather", 2**27),
        ("reduce_scatter", 2**27),
    ):
        flags.append(
            Flag(
                f"xla_gpu_{operation}_combine_threshold_bytes",
                str(combined),
                "a few large messages in place of many small ones",
                source,
            )
        )
        # jaxlib 0.11 has the new name (seen: 0.11.2), 0.10.2 only the old one.
        new = _version(jaxlib) >= (0, 11)
        name = f"pipeline_{operation}" if new else f"enable_pipelined_{operation}"
        flags.append(Flag(f"xla_gpu_{name}", "on" if new else "true", _PIPELINE, source))
    return flags


def _tpu_flags(chip: str | None, slices: int) -> list[Flag]:
    source = f"{_MAXTEXT}, configs/tpu/v5p/256b.sh"
    flags = [
        Flag("xla_tpu_enable_async_collective_fusion", "true", _OVERLAP, source),
        Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", _OVERLAP, source),
        Flag("xla_tpu_overlap_compute_collective_tc", "true", _OVERLAP, source),
        Flag("xla_enable_async_all_gather", "true", _OVERLAP, source),
    ]
    if chip in _SCOPED_VMEM:
        kib, where = _SCOPED_VMEM[chip]
        flags.append(
            Flag(
                "xla_tpu_scoped_vmem_limit_kib",
                kib,
                "room for splash attention's large blocks and for fusions",
                f"{_MAXTEXT}, {where}",
            )
        )
    if slices > 1:
        reason = "the gradients' sum over the data-centre network runs beside the backward pass"
        for name in (
            "enable_data_parallel_all_reduce_opt",
            "data_parallel_opt_different_sized_ops",
        ):
            flags.append(Flag(f"xla_tpu_{name}", "true", reason, source))
    return flags


def chosen(
    platform: Platform,
    chip: str | None,
    slices: int,
    wanted: Sequence[str],
    deterministic: bool = False,
) -> tuple[dict[str, Flag], dict[str, Flag], list[str]]:
    """Ours and those that `wanted` (Train.xla_flags) adds or changes, by name, and notes. UserError
    for what is neither "name=value" nor "-name"."""
    ours = {f.name: f for f in flags_for(platform, _installed("jaxlib"), chip, slices)}
    if deterministic and platform == "gpu":
        reason = "a resumed run is bit-identical"
        name = "xla_gpu_deterministic_ops"
        ours[name] = Flag(name, "true", reason, "Train.deterministic")
    theirs: dict[str, Flag] = {}
    notes = []
    for text in wanted:
        name, equals, value = text.lstrip("-").partition("=")
        if equals:
            theirs[name] = Flag(name, value, "given", "Train.xla_flags")
        elif text.startswith("-"):
            if ours.pop(name, None) is None:
                notes.append(f"{text}: not among the flags for {platform}")
        else:
            raise UserError(
                f"Train.xla_flags: {text!r}: give name=value to add a flag, -name to drop one"
            )
    return ours, theirs, notes


def choose(
    wanted: Sequence[str], environment: Mapping[str, str], deterministic: bool = False
) -> tuple[Platform, list[Flag], list[str]]:
    """The backend, its flags, and what was left out and why.

    `wanted` (Train.xla_flags) adds "name=value" and drops "-name"; a flag that the environment
    gives already stands as it is there. Raises UserError for a flag of the user's that the compiler
    refuses; one of ours is left out.
    """
    platform = find_platform(environment)
    chip = _chip(environment) if platform == "tpu" else None
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    ours, theirs, notes = chosen(platform, chip, slices, wanted, deterministic)
    variable = VARIABLES[platform]
    already = environment.get(variable, "").split()
    given = [str(flag) for flag in theirs.values()]
    if fault := fault_of([*already, *given], platform):
        raise UserError(f"{fault}; see {variable} and Train.xla_flags")
    set_already = {flag.lstrip("-").partition("=")[0] for flag in already}
    kept = {n: f for n, f in ours.items() if n not in theirs and n not in set_already}
    if kept and fault_of([str(flag) for flag in kept.values()], platform):
        for name, flag in list(kept.items()):
            if fault := fault_of([str(flag)], platform):
                notes.append(f"{flag} is left out: {fault}")
                del kept[name]
    return platform, [*kept.values(), *theirs.values()], notes


def set_flags(wanted: Sequence[str], deterministic: bool = False) -> list[str]:
    """Puts the chosen flags where the compiler reads them, at the first use of a device; gives
    notes for a person. Raises as `choose` does."""
    platform, flags, notes = choose(wanted, os.environ, deterministic)
    variable = VARIABLES[platform]
    already = os.environ.get(variable, "").split()
    new = [str(flag) for flag in flags if str(flag) not in already]
    if new:
        os.environ[variable] = " ".join([*already, *new])
    return notes


def find_platform(environment: Mapping[str, str]) -> Platform:
    """Where jax will run, without asking it: that would begin to use the devices."""
    first = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if first == "tpu" or (not first and on_tpu_host(environment)):
        return "tpu"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    installed = any(importlib.util.find_spec(plugin) for plugin in plugins)
    if first in ("cuda", "gpu") or (not first and installed and gpus()):
        return "gpu"
    return "cpu"


@cache
def _metadata_accelerator(address: str) -> str:
    """ "v5p-128", from a TPU VM's metadata server; empty where there is none."""
    request = urllib.request.Request(
        f"http://{address}/computeMetadata/v1/instance/attributes/accelerator-type",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _chip(environment: Mapping[str, str]) -> str | None:
    address = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    kind = environment.get("TPU_ACCELERATOR_TYPE") or _metadata_accelerator(address)
    return kind.partition("-")[0].lower() or None


def _installed(package: str) -> str:
    return importlib.metadata.version(package)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


# --- does the compiler know it? -------------------------------------------------------------------

# Each reads its variable and aborts, or ends, at what it does not like; nothing touches a device.
_ASKS_XLA = "from jaxlib import _jax; _jax.CompileOptions().executable_build_options.debug_options"
_ASKS_LIBTPU = (
    "from jax.experimental import topologies as t; "
    "t.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
)


def fault_of(flags: Sequence[str], platform: Platform) -> str | None:
    """What the installed compiler says against flags ("--name=value"), None if nothing."""
    return _fault_of(tuple(flags), platform) if flags else None


@cache
def _fault_of(flags: tuple[str, ...], platform: Platform) -> str | None:
    code = _ASKS_LIBTPU if platform == "tpu" else _ASKS_XLA
    environment = os.environ | {VARIABLES[platform]: " ".join(flags)}
    if platform == "tpu":
        environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return None
    return explain(done.stderr, platform) if done.returncode else None


def explain(text: str, platform: Platform) -> str | None:
    """The one line that matters of a compiler's complaint about flags, None: it is about something
    else."""
    compiler = "libtpu" if platform == "tpu" else "XLA"
    version = f"{compiler} of jaxlib {_installed('jaxlib')}"
    if unknown := re.search(r"Unknown flags? in XLA_FLAGS: (.*)", text):
        return f"the {version} does not know {unknown[1].strip()}"
    if unknown := re.search(r"Unknown command line flag '([^']*)'", text):
        return f"the {version} does not know --{unknown[1]}"
    if illegal := re.search(r"Illegal value '([^']*)' specified for flag '([^']*)'", text):
        return f"the {version} does not take {illegal[1]!r} for --{illegal[2]}"
    if "Flag parsing failed" in text:
        first = re.search(r"usage: (.*)", text)
        return f"the {version} does not take {first[1].strip() if first else 'a flag'}"
    return None
