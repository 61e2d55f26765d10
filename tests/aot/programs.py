"""Programs compiled by the real compilers for devices that are not there, as text."""

import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from olmo_jax.parallel.mesh import MeshConfig, build_mesh
from olmo_jax.plan.targets import parse_target, target_devices


def mesh_of(name: str, **axes: int) -> Any:
    """A mesh of the devices of `name`, such as v5p-8."""
    return build_mesh(MeshConfig(**axes), target_devices(parse_target(name)))


def compiled(function: Any, *arguments: Any) -> tuple[str, int]:
    """A jitted function's program after optimisation, and its temporaries in bytes a device.

    TPU programs are read from the compiler's dump: libtpu 0.0.52 cannot print some of them once
    they are compiled (`as_text()` fails on an async-update of several operands).
    """
    device = jax.tree.leaves(arguments)[0].sharding.mesh.devices.flat[0]
    if device.platform != "tpu":
        program = function.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
        return program.as_text(), program.memory_analysis().temp_size_in_bytes
    lowered = function.trace(*arguments).lower(lowering_platforms=("tpu",))
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        stats = lowered.compile(compiler_options=dump).memory_analysis()
        (text,) = (p.read_text() for p in Path(folder).glob("*.after_optimizations.txt"))
    return text, stats.temp_size_in_bytes


def kernels_in(text: str) -> list[str]:
    """The fused attention kernels that a program calls: cuDNN's targets, splash's names."""
    cudnn = re.findall(r'custom_call_target="(__cudnn\$fmha\w+)"', text)
    splash = re.findall(r"%(splash_mha_(?:fwd|dq|dkv))\w*(?:\.\d+)* = ", text)
    return sorted({*cudnn, *splash})


def square_buffers(text: str, T: int) -> list[str]:
    """Shapes in a program that hold whole scores: two axes of T, or of several T joined."""
    shapes = set(re.findall(r"\w+\[([1-9][\d,]*)\]", text))
    return [s for s in shapes if sum(int(n) % T == 0 for n in s.split(",")) > 1]


def array(mesh, shape, dtype, *spec) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)
