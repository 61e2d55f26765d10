"""`olmo-jax plan search`: remat policies, meshes and micro-batches, compiled and ranked.

One thing at a time, each time from the best so far: all combinations would be ten times as many
compilations, and a large one takes minutes. Compilers run in processes of their own.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import get_args, get_type_hints

from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.plan.roofline import Outlook
from olmo_jax.plan.run import Request, carry_out, changed
from olmo_jax.plan.targets import Target, parse_target

REMAT = tuple(get_args(get_type_hints(ModelConfig)["remat"]))


@dataclass
class Found:
    """What a search tried."""

    done: list[tuple[str, Outlook]] = field(default_factory=list)
    """(what was tried, its outlook), the best first."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(what was tried, why it cannot be)."""


def search(request: Request, processes: int = 2) -> Found:
    """Tries what `request` leaves open: what it names itself (mesh, micro, remat) stays.

    Best: fits, then the least bound, and of bounds within a thousandth the least memory.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    found, best = Found(), request
    target = parse_target(request.target)
    stages: list[Callable[[Request], list[Request]]] = []
    if request.remat is None:
        stages.append(lambda best: [replace(best, remat=policy) for policy in REMAT])
    if request.mesh is None:
        stages.append(lambda best: [replace(best, mesh=mesh) for mesh in meshes(best, target)])
    if request.micro is None:
        stages.append(lambda best: [replace(best, micro=n) for n in micro_batches(best, target)])
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    context = multiprocessing.get_context("spawn")  # each loads its compiler for itself
    with (
        ProcessPoolExecutor(processes, mp_context=context) as pool,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        task = bar.add_task("compiling", total=0)
        for stage in stages or [lambda best: [best]]:
            tried = {what for what, _ in [*found.done, *found.refused]}
            candidates = [c for c in stage(best) if describe(c) not in tried]
            bar.update(task, total=(bar.tasks[0].total or 0) + len(candidates))
            _try_all(pool, candidates, found, lambda: bar.advance(task))
            found.done.sort(key=lambda entry: rank(entry[1]))
            if found.done:
                by_name = {describe(c): c for c in candidates}
                best = by_name.get(found.done[0][0], best)
    return found


def _try_all(
    pool: Executor, candidates: Sequence[Request], found: Found, advance: Callable[[], None]
) -> None:
    running = {pool.submit(_attempt, candidate): candidate for candidate in candidates}
    for future in as_completed(running):
        what, result = describe(running[future]), future.result()
        if isinstance(result, Outlook):
            found.done.append((what, result))
        else:
            found.refused.append((what, result))
        advance()


def _attempt(request: Request) -> Outlook | str:
    try:
        return carry_out(replace(request, name=describe(request)))
    except UserError as error:
        return str(error)


def describe(request: Request) -> str:
    """What a candidate has that others may not."""
    run = changed(request)
    axes = {axis: n for axis, n in vars(run.mesh).items() if isinstance(n, int) and n != 1}
    mesh = " ".join(f"{axis}={'rest' if n == -1 else n}" for axis, n in axes.items())
    micro = run.train.micro_batch_size
    return f"{mesh or 'one device'}, remat {run.model.remat}, micro-batch {micro or 'whole'}"


def rank(outlook: Outlook) -> tuple[bool, float, int]:
    """Less is better."""
    seconds = outlook.bound_seconds
    return not outlook.fits, float(f"{seconds:.3g}") if seconds else 1e9, outlook.memory_needed


def meshes(request: Request, target: Target) -> list[str]:
    """Meshes worth a try: fsdp over all; with data, tensor, context or expert taking a factor of 2
    to 8 from it, as far as the model's heads and experts divide."""
    run = changed(request)
    model, n = run.model, target.devices // target.slices
    out = [f"slice={target.slices},fsdp=-1"]
    factors = [f for f in (2, 4, 8) if n % f == 0 and f <= n]
    for factor in factors:
        if model.kv_heads % factor == 0 and model.mlp_width % factor == 0:
            out.append(f"slice={target.slices},fsdp=-1,tensor={factor}")
    for factor in factors[1:]:
        out.append(f"slice={target.slices},data={factor},fsdp=-1")
        if model.n_experts and model.n_experts % factor == 0:
            out.append(f"slice={target.slices},fsdp=-1,expert={factor}")
    if run.data.batch_size < target.devices:  # rows do not reach every device
        for factor in factors:
            out.append(f"slice={target.slices},fsdp=-1,context={factor}")
    return out


def micro_batches(request: Request, target: Target) -> list[int]:
    """The whole batch, and parts that leave each device 1, 2, or 4 rows."""
    size = changed(request).data.batch_size
    parts = [target.devices * rows for rows in (1, 2, 4)]
    return [0, *(n for n in parts if n < size and size % n == 0)]
