"""The real training step, compiled by the real compiler for devices that are not there.

Shapes stand for weights and batches; nothing is allocated and nothing runs.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from olmo_jax.data.batch import Batch
from olmo_jax.files import write_bytes
from olmo_jax.model.transformer import abstract_model, kernels_for
from olmo_jax.ops.kernels import Kernels
from olmo_jax.parallel.mesh import build_mesh
from olmo_jax.parallel.sharding import batch_sharding, replicated
from olmo_jax.plan import hlo
from olmo_jax.plan.count import Count, count
from olmo_jax.plan.hlo import Collective, Traffic, read_traffic
from olmo_jax.plan.targets import Target, target_devices
from olmo_jax.train.config import RunConfig
from olmo_jax.train.fit import refuse_misfit
from olmo_jax.train.step import Trainer


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs."""

    parameters: int
    optimizer: int
    """Moments, counters, SkipStep's window."""
    batch: int
    temporaries: int = 0
    """Activations, gradients, gathered weights, buffers: what the compiler allocates."""
    code: int = 0

    @property
    def total(self) -> int:
        """All of it; the new state takes the old one's place (it is donated)."""
        return self.parameters + self.optimizer + self.batch + self.temporaries + self.code


@dataclass(frozen=True)
class Program:
    """One step for one target, traced and compiled."""

    target: Target
    mesh: Mesh
    kernels: Kernels
    work: Count
    """FLOPs, of all devices together."""
    memory: Memory
    traffic: Traffic | None
    """None where the compiler gave up for want of memory before it had a program."""
    seconds: float
    """Time that lowering and compiling took (when it was done: see `cached`)."""
    cached: bool
    """Found compiled in the cache."""


def compile_step(run: RunConfig, target: Target, use_cache: bool = True) -> Program:
    """Compiles `run`'s step of its largest batch for `target`.

    A step that does not fit is no error: its Program says how much memory it needs. What was
    compiled before, the same program with the same versions, is read from the cache.
    """
    mesh = build_mesh(run.mesh, target_devices(target))
    kernels = kernels_for(run.model, mesh.devices.flat[0], run.mesh.context_form)
    sizes = _batch_sizes(run)
    T, micro = run.data.sequence_length, run.train.micro_batch_size
    refuse_misfit(mesh, run.model, T, sizes, micro)
    model = abstract_model(run.model, kernels)
    trainer = Trainer(model, run.optimizer, mesh, run.train.z_loss, run.train.micro_batch_size)
    state, batch = trainer.abstract_state, abstract_batch(run, mesh)
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(mesh))
    start = time.perf_counter()
    step: Any = trainer.step
    traced = step.trace(state, batch, scalar, scalar)
    work = count(traced.jaxpr)
    lowered = traced.lower(lowering_platforms=(target.platform,))
    known = Memory(
        parameters=bytes_a_device(state.params),
        optimizer=bytes_a_device((state.opt_state, state.skip, state.step)),
        batch=bytes_a_device(batch),
    )
    cache = _cache_file(lowered.as_text(), target)
    found = _read_cache(cache) if use_cache else None
    if found:
        return Program(target, mesh, kernels, work, *found, cached=True)
    memory, traffic = compile_lowered(lowered, target, known, dict(mesh.shape))
    seconds = time.perf_counter() - start
    _write_cache(cache, memory, traffic, seconds)
    return Program(target, mesh, kernels, work, memory, traffic, seconds, cached=False)


def compile_lowered(
    lowered: Any, target: Target, known: Memory, mesh_shape: dict[str, int]
) -> tuple[Memory, Traffic | None]:
    """Runs the compiler on `jax.stages.Lowered`; `known` has the sizes of what is passed in."""
    with tempfile.TemporaryDirectory(prefix="olmo_jax_plan_") as folder:
        # libtpu 0.0.52 cannot print some programs once compiled (neither as_text nor hlo_modules:
        # an async-update of several operands), so it is asked to leave its text on the way.
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        options: Any = dump if target.platform == "tpu" else None
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = bytes_needed(str(error))
            if needed is None:
                raise
            memory = replace(known, temporaries=max(0, needed - known.total))
            return memory, _dumped_traffic(Path(folder), mesh_shape)
        stats = compiled.memory_analysis()
        # Outputs that take no donated input's place (the metrics) are counted with temporaries.
        rest = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
        memory = replace(
            known,
            temporaries=stats.temp_size_in_bytes + rest,
            code=stats.generated_code_size_in_bytes,
        )
        if target.platform == "tpu":
            return memory, _dumped_traffic(Path(folder), mesh_shape)
        return memory, read_traffic(compiled.as_text(), mesh_shape)


def _dumped_traffic(folder: Path, mesh_shape: dict[str, int]) -> Traffic | None:
    for ending in ("after_optimizations", "after_optimizations_before_buffer_assignment"):
        for path in folder.glob(f"*.{ending}.txt"):
            return read_traffic(path.read_text(), mesh_shape)
    return None


def _batch_sizes(run: RunConfig) -> list[int]:
    """Every size of a batch in the schedule, whether the run gets there or not."""
    return [run.data.batch_size, *(size for _, size in run.data.batch_size_schedule)]


def abstract_batch(run: RunConfig, mesh: Mesh) -> Batch:
    """The shapes of the run's largest batch, as the loader makes it."""
    shape, sharding = (max(_batch_sizes(run)), run.data.sequence_length), batch_sharding(mesh)

    def array(dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids = np.int32
    return Batch(array(ids), array(ids), array(ids), array(ids), array(np.bool_), None)


def bytes_a_device(tree: Any) -> int:
    """Bytes of one device's part of arrays (or shapes) with shardings."""
    return sum(
        int(np.prod(a.sharding.shard_shape(a.shape), dtype=np.int64)) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_needed(message: str) -> int | None:
    """How many bytes a compiler wanted that ran out of the device's memory; None: another error."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message) or re.search(
        r"memory required for [\w ]+ \(([\d.]+)([KMGT]?)\) exceeds", message
    )
    if not found:
        return None
    return int(float(found[1]) * _UNITS[found[2]])


# --- the cache ------------------------------------------------------------------------------------
#
# JAX's own compilation cache does not take programs for devices that are not there. A TPU compile
# is minutes of CPU; what is kept of it is a page of JSON.


def _cache_file(program: str, target: Target) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "olmo_jax" / "plan"
    compiler = ("libtpu",) if target.platform == "tpu" else ("jax-cuda13-pjrt",)
    versions = [importlib.metadata.version(name) for name in ("jaxlib", *compiler)]
    reader = Path(hlo.__file__).read_text()  # what is kept is what it read
    key = "\n".join([program, target.name, *versions, reader, os.environ.get("XLA_FLAGS", "")])
    return root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read_cache(path: Path) -> tuple[Memory, Traffic | None, float] | None:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    traffic = kept["traffic"]
    if traffic:
        collectives = [
            Collective(**{**c, "axes": tuple(c["axes"]), "devices": tuple(c["devices"])})
            for c in traffic.pop("collectives")
        ]
        traffic = Traffic(collectives, **traffic)
    return Memory(**kept["memory"]), traffic, kept["seconds"]


def _write_cache(path: Path, memory: Memory, traffic: Traffic | None, seconds: float) -> None:
    kept = {
        "memory": asdict(memory),
        "traffic": asdict(traffic) if traffic else None,
        "seconds": seconds,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps(kept).encode())
    except OSError:
        pass  # a plan needs no cache
