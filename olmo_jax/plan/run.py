"""One request to `olmo-jax plan`: a configuration with a target and what it changes, to an Outlook.

A Request is plain data, so that other processes can carry it out.
"""

from dataclasses import dataclass, replace
from typing import Any, cast, get_args, get_type_hints

from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.parallel.mesh import AXES, MeshConfig
from olmo_jax.plan.roofline import GRID_GCO2_PER_KWH, PUE, Outlook
from olmo_jax.plan.targets import parse_target
from olmo_jax.train.config import RunConfig


@dataclass(frozen=True)
class Request:
    """A run on a target. What is None is as the configuration has it."""

    run: RunConfig
    target: str
    name: str
    mesh: str | None = None
    """Axes that differ from one device: fsdp=64 or data=2,fsdp=-1."""
    batch: int | None = None
    """Instances a step."""
    micro: int | None = None
    """Instances in one forward and backward pass; 0: the whole batch."""
    remat: str | None = None
    tokens: int | None = None
    pue: float = PUE
    grid: float = GRID_GCO2_PER_KWH
    use_cache: bool = True


def carry_out(request: Request) -> Outlook:
    """Compiles and estimates. UserError for what a person can mend."""
    from olmo_jax.plan.compile import compile_step
    from olmo_jax.plan.roofline import outlook
    from olmo_jax.train.plan import Plan

    run = changed(request)
    program = compile_step(run, parse_target(request.target), request.use_cache)
    tokens = request.tokens or Plan(request.run).tokens  # the recipe's, at the recipe's batch
    return outlook(run, program, request.name, tokens, request.pue, request.grid)


def changed(request: Request) -> RunConfig:
    """The configuration with the request's changes."""
    run = request.run
    slices = parse_target(request.target).slices
    if request.mesh is not None:
        run = replace(run, mesh=_mesh(run.mesh, request.mesh))
    if run.mesh.slice == 1 and slices > 1:
        run = replace(run, mesh=replace(run.mesh, slice=slices))
    if request.batch is not None:
        run = replace(run, data=replace(run.data, batch_size=request.batch, batch_size_schedule=()))
    if request.micro is not None:
        run = replace(run, train=replace(run.train, micro_batch_size=request.micro or None))
    if request.remat is not None:
        policies = get_args(get_type_hints(ModelConfig)["remat"])
        if request.remat not in policies:
            raise UserError(f"--remat={request.remat}: give one of {', '.join(policies)}")
        run = replace(run, model=replace(run.model, remat=cast(Any, request.remat)))
    return run


def _mesh(mesh: MeshConfig, text: str) -> MeshConfig:
    """fsdp=64,tensor=4: those axes, the others 1 (fsdp takes the rest where it is not named and
    none is -1)."""
    ones: dict[str, Any] = {axis: 1 for axis in AXES}
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.lstrip("-").isdigit():
            raise UserError(
                f"--mesh={text}: {part!r} is not AXIS=N; axes: {', '.join(AXES)} "
                "(such as fsdp=64 or data=4,fsdp=16)"
            )
        sizes[axis] = int(size)
    rest = {} if "fsdp" in sizes or -1 in sizes.values() else {"fsdp": -1}
    return replace(mesh, **{**ones, **rest, **sizes})
