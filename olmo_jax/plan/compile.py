"""The real training step, compiled by the real compiler for devices that are not there.

Shapes stand for weights and batches; nothing is allocated and nothing runs.
"""

import hashlib
import importlib.metadata
import json
import multiprocessing
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
from olmo_jax.parallel.xla_flags import Platform, chosen
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
    """The program itself; not known of a TPU's, which is not made to its end."""

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
    refused: tuple[str, ...] = ()
    """Flags of a run that its compiler does not take for one compilation: left out."""


def compile_step(run: RunConfig, target: Target, use_cache: bool = True) -> Program:
    """Compiles `run`'s step of its largest batch for `target`.

    A step that does not fit is no error: its Program says how much memory it needs. What was
    compiled before, the same program with the same versions, is read from the cache.
    """
    start = time.perf_counter()
    mesh, kernels, trainer, arguments = _trainer(run, target)
    traced = trainer.step.trace(*arguments)
    work = count(traced.jaxpr)
    lowered = traced.lower(lowering_platforms=(target.platform,))
    state, batch, *_ = arguments
    known = Memory(
        parameters=bytes_a_device(state.params),
        optimizer=bytes_a_device((state.opt_state, state.skip, state.step)),
        batch=bytes_a_device(batch),
    )
    flags = flags_of(run, target)
    cache = _cache_file(lowered.as_text(), target, flags)
    found = _read_cache(cache) if use_cache else None
    if found:
        memory, traffic, seconds, refused = found
    else:
        refused = tuple(name for name in flags if not _takes(target, mesh, {name: flags[name]}))
        flags = {name: value for name, value in flags.items() if name not in refused}
        if target.platform == "tpu":
            memory, traffic = _compile_for_tpu(run, target, known, dict(mesh.shape), flags)
        else:
            memory, traffic = _compile_for_gpu(lowered, known, dict(mesh.shape), flags)
        seconds = time.perf_counter() - start
        _write_cache(cache, memory, traffic, seconds, refused)
    done = bool(found)
    return Program(target, mesh, kernels, work, memory, traffic, seconds, done, refused)


def _trainer(run: RunConfig, target: Target) -> tuple[Mesh, Kernels, Any, tuple]:
    """The mesh, the kernels, the trainer, and the shapes that its step takes."""
    mesh = build_mesh(run.mesh, target_devices(target))
    kernels = kernels_for(run.model, mesh.devices.flat[0], run.mesh.context_form, mesh.size)
    micro = run.train.micro_batch_size
    refuse_misfit(mesh, run.model, run.data.sequence_length, _batch_sizes(run), micro)
    model = abstract_model(run.model, kernels)
    trainer = Trainer(model, run.optimizer, mesh, run.train.z_loss, micro)
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(mesh))
    arguments = (trainer.abstract_state, abstract_batch(run, mesh), scalar, scalar)
    return mesh, kernels, trainer, arguments


def flags_of(run: RunConfig, target: Target) -> dict[str, str | bool]:
    """The compiler flags that the run would have on the target, ours and its own, as jax takes them
    (of a GPU's, a switch only as a bool)."""
    platform: Platform = "tpu" if target.platform == "tpu" else "gpu"
    asked, fixed = run.train.xla_flags, run.train.deterministic
    ours, theirs, _ = chosen(platform, target.chip.name, target.slices, asked, fixed)
    switch = {"true": True, "false": False}
    return {name: switch.get(flag.value, flag.value) for name, flag in (ours | theirs).items()}


def _takes(target: Target, mesh: Mesh, flag: dict[str, str | bool]) -> bool:
    """Whether the target's compiler takes a flag for one compilation, tried on an addition."""
    one = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(mesh))
    added = jax.jit(lambda x: x + 1).trace(one).lower(lowering_platforms=(target.platform,))
    try:
        added.compile(compiler_options=flag)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _compile_for_gpu(
    lowered: Any, known: Memory, mesh_shape: dict[str, int], flags: dict[str, str | bool]
) -> tuple[Memory, Traffic | None]:
    try:
        compiled = lowered.compile(compiler_options=flags)
    except jax.errors.JaxRuntimeError as error:
        return _too_much(str(error), known), None
    stats = compiled.memory_analysis()
    # Outputs that take no donated input's place (the metrics) are counted with temporaries.
    rest = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    memory = replace(
        known,
        temporaries=stats.temp_size_in_bytes + rest,
        code=stats.generated_code_size_in_bytes,
    )
    return memory, read_traffic(compiled.as_text(), mesh_shape)


def _too_much(error: str, known: Memory) -> Memory:
    """What a compiler wanted that ran out of memory; other errors are raised again."""
    needed = bytes_needed(error)
    if needed is None:
        raise jax.errors.JaxRuntimeError(error)
    return replace(known, temporaries=max(0, needed - known.total))


# A TPU program is optimised, and its buffers are placed, in the first tenth of the time that it
# takes to compile (OLMo-3-7B on 64 chips: 12 s of 150 and more, on one core); the rest makes the
# chip's instructions, which say nothing of a plan. So the compiler runs in a process of its own,
# leaves its text on the way, and is ended when that is there. (Once compiled, some programs cannot
# be printed: libtpu 0.0.52, an async-update of several operands.)
_LAST = "after_optimizations_after_buffer_assignment"


def _compile_for_tpu(
    run: RunConfig,
    target: Target,
    known: Memory,
    mesh_shape: dict[str, int],
    flags: dict[str, str | bool],
) -> tuple[Memory, Traffic | None]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="olmo_jax_plan_") as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        arguments = (there, run, target, flags | dump)
        compiler = context.Process(target=_compile_and_tell, args=arguments, daemon=True)
        compiler.start()
        there.close()
        error = ""
        try:
            while not _dumped(folder, _LAST):
                if here.poll(0.2):
                    error = here.recv()
                    break
        except EOFError:
            raise RuntimeError(f"the compiler for {target.name} ended without a word") from None
        finally:
            compiler.kill()
            compiler.join()
        if error:
            memory = _too_much(error, known)
        else:
            report = _dumped(folder, "after_optimizations-memory-usage-report")
            memory = replace(known, temporaries=_reported_bytes(report) - known.total)
        text = _dumped(folder, "after_optimizations") or _dumped(
            folder, "after_optimizations_before_buffer_assignment"
        )
        return memory, read_traffic(text, mesh_shape) if text else None


def _compile_and_tell(there: Any, run: RunConfig, target: Target, options: dict) -> None:
    """In the compiler's process: compiles, and sends the error that it ended with, if any."""
    _, _, trainer, arguments = _trainer(run, target)
    lowered = trainer.step.trace(*arguments).lower(lowering_platforms=(target.platform,))
    try:
        lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        there.send(str(error))
    else:
        there.send("")


def _dumped(folder: str, ending: str) -> str:
    """The text of the step that the compiler left, empty where there is none (yet)."""
    for path in Path(folder).glob(f"*jit__step*.{ending}.txt"):
        return path.read_text()
    return ""


def _reported_bytes(report: str) -> int:
    """A TPU program's bytes in the device's main memory, arguments included."""
    found = re.search(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)", report)
    assert found, report[:200]
    return int(found[1])


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


def _cache_file(program: str, target: Target, flags: dict[str, str | bool]) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "olmo_jax" / "plan"
    compiler = ("libtpu",) if target.platform == "tpu" else ("jax-cuda13-pjrt",)
    versions = [importlib.metadata.version(name) for name in ("jaxlib", *compiler)]
    reader = Path(hlo.__file__).read_text()  # what is kept is what it read
    given = [os.environ.get("XLA_FLAGS", ""), json.dumps(flags)]
    key = "\n".join([program, target.name, *versions, reader, *given])
    return root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read_cache(path: Path) -> tuple[Memory, Traffic | None, float, tuple[str, ...]] | None:
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
    return Memory(**kept["memory"]), traffic, kept["seconds"], tuple(kept["refused"])


def _write_cache(
    path: Path, memory: Memory, traffic: Traffic | None, seconds: float, refused: tuple[str, ...]
) -> None:
    kept = {
        "memory": asdict(memory),
        "traffic": asdict(traffic) if traffic else None,
        "seconds": seconds,
        "refused": refused,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps(kept).encode())
    except OSError:
        pass  # a plan needs no cache
