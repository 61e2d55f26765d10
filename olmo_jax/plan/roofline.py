"""The bound of a step by one formula, and what follows from it: speed, days, energy, carbon.

    bound = max(compute, memory, inside, outside), in seconds:
    compute  = FLOPs of a device / its peak
    memory   = bytes that it reads and writes / its memory's bandwidth
    inside   = sum over collectives of the bytes it sends within its slice or node / link bandwidth
    outside  = the same beyond its slice or node / network bandwidth

It is what no run can beat with this program: everything overlaps, every unit at its peak, links
without latency. A real run is slower; compare bounds with bounds.
"""

from dataclasses import asdict, dataclass
from typing import Any

from olmo_jax.plan.compile import Memory, Program
from olmo_jax.plan.hlo import Collective
from olmo_jax.plan.targets import Target
from olmo_jax.train.config import RunConfig
from olmo_jax.train.flops import flops_per_token

# Power of the building for each watt of machine: Google's fleet in 2024 (its environmental report,
# 2025). The world's mean of electricity in 2024: Ember, Global Electricity Review 2025.
PUE = 1.09
GRID_GCO2_PER_KWH = 473.0


@dataclass(frozen=True)
class Bound:
    """Least seconds of a step, by what would need them."""

    compute: float
    memory: float
    inside: float
    outside: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.inside, self.outside)

    def by(self, target: Target) -> str:
        """What bounds the step, in words."""
        inside, outside = names(target)
        parts = {
            "compute": self.compute,
            "memory bandwidth": self.memory,
            inside: self.inside,
            outside: self.outside,
        }
        return max(parts, key=lambda name: parts[name])


def names(target: Target) -> tuple[str, str]:
    """What the links within and beyond a slice or node are called."""
    return ("ICI", "DCN") if target.platform == "tpu" else ("NVLink", "network")


@dataclass(frozen=True)
class Outlook:
    """Everything that `olmo-jax plan` says of one run on one target."""

    name: str
    target: str
    about: str
    chips: int
    devices: int
    mesh: dict[str, int]
    batch_size: int
    micro_batch_size: int | None
    sequence_length: int
    remat: str
    kernels: dict[str, Any]
    parameters: int
    memory: dict[str, int]
    """Bytes a device, by use."""
    memory_needed: int
    memory_there: float
    fits: bool
    flops: float
    """A step's, all devices together, by our counter."""
    flops_kernels: float
    """Of these the attention kernels'."""
    flops_device: float
    products_compiled: float | None
    """FLOPs a device of the compiled program's products, kernels left out: more than its share says
    that devices do the same work."""
    calls: dict[str, float]
    memory_traffic: float | None
    """Bytes a device reads and writes."""
    collective_bytes: dict[str, float]
    """Bytes that a device sends, by mesh axis."""
    bound: dict[str, float] | None
    bound_seconds: float | None
    bound_by: str | None
    tokens_a_step: int
    tokens_per_second: float | None
    mfu: float | None
    tokens: int
    days: float | None
    chip_hours: float | None
    energy_kwh: float | None
    carbon_kg: float | None
    assumptions: dict[str, float]
    compile_seconds: float
    cached: bool
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def outlook(
    run: RunConfig,
    program: Program,
    name: str,
    tokens: int,
    pue: float = PUE,
    grid: float = GRID_GCO2_PER_KWH,
) -> Outlook:
    """What a compiled step means for a run of `tokens` tokens.

    grid: grams of CO2 (equivalent) for a kWh.
    """
    target, chip = program.target, program.target.chip
    sizes = [run.data.batch_size, *(size for _, size in run.data.batch_size_schedule)]
    tokens_a_step = max(sizes) * run.data.sequence_length
    flops_device = program.work.flops / target.devices
    limits = bound(program)
    seconds = limits.seconds if limits else None
    speed = tokens_a_step / seconds if seconds else None
    hours = tokens / speed / 3600 if speed else None
    model_flops = flops_per_token(run.model, run.data.sequence_length)
    kwh = hours * target.chips * (chip.watts + chip.host_watts) * pue / 1000 if hours else None
    notes = [*program.kernels.notes, *sorted(program.work.notes)]
    if program.refused:
        names = ", ".join(program.refused)
        notes.append(
            f"compiled without flags that the compiler does not take for one program: {names}"
        )
    traffic = program.traffic
    if traffic is None:
        notes.append("the compiler gave up for want of memory: no traffic, no bound")
    else:
        share = program.work.products / target.devices
        if traffic.products > 1.05 * share:
            notes.append(
                f"the compiled program makes {traffic.products / share:.2f} times its share of the "
                "matrix products: devices do the same work"
            )
    memory = program.memory
    return Outlook(
        name=name,
        target=target.name,
        about=f"{target.chips} x {chip.about}"
        + (f" in {target.slices} slices" if target.slices > 1 else ""),
        chips=target.chips,
        devices=target.devices,
        mesh={axis: n for axis, n in program.mesh.shape.items() if n > 1},
        batch_size=max(sizes),
        micro_batch_size=run.train.micro_batch_size,
        sequence_length=run.data.sequence_length,
        remat=run.model.remat,
        kernels=asdict(program.kernels),
        parameters=run.model.parameter_count(),
        memory=_uses(memory),
        memory_needed=memory.total,
        memory_there=chip.memory_device,
        fits=memory.total <= chip.memory_device,
        flops=program.work.flops,
        flops_kernels=program.work.kernels,
        flops_device=flops_device,
        products_compiled=traffic.products if traffic else None,
        calls=dict(program.work.calls),
        memory_traffic=traffic.memory if traffic else None,
        collective_bytes=traffic.by_axis() if traffic else {},
        bound=asdict(limits) if limits else None,
        bound_seconds=seconds,
        bound_by=limits.by(target) if limits else None,
        tokens_a_step=tokens_a_step,
        tokens_per_second=speed,
        mfu=speed * model_flops / (chip.peak * target.chips) if speed else None,
        tokens=tokens,
        days=hours / 24 if hours else None,
        chip_hours=hours * target.chips if hours else None,
        energy_kwh=kwh,
        carbon_kg=kwh * grid / 1000 if kwh else None,
        assumptions={
            "chip_watts": chip.watts,
            "host_watts_per_chip": chip.host_watts,
            "pue": pue,
            "grid_gco2_per_kwh": grid,
        },
        compile_seconds=program.seconds,
        cached=program.cached,
        notes=tuple(notes),
    )


def _uses(memory: Memory) -> dict[str, int]:
    return {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "temporaries": memory.temporaries,
        "program": memory.code,
    }


def bound(program: Program) -> Bound | None:
    """The step's bound; None where the compiler gave no program."""
    traffic, target = program.traffic, program.target
    if traffic is None:
        return None
    chip = target.chip
    places = [_place(target, device) for device in program.mesh.devices.flat]
    times = [link_seconds(c, target, places) for c in traffic.collectives]
    return Bound(
        compute=program.work.flops / target.devices / (chip.peak / chip.devices),
        memory=traffic.memory / (chip.bandwidth / chip.devices),
        inside=sum(inside for inside, _ in times),
        outside=sum(outside for _, outside in times),
    )


@dataclass(frozen=True)
class Place:
    """Where a device is: which slice or node, and its coordinates in the slice's torus."""

    part: int
    coordinates: tuple[int, ...] = ()


def _place(target: Target, device: Any) -> Place:
    if target.platform == "cuda":
        return Place(device.process_index)
    return Place(getattr(device, "slice_index", None) or 0, tuple(device.coords))


def link_seconds(
    collective: Collective, target: Target, places: list[Place]
) -> tuple[float, float]:
    """Seconds that one device's links within, and beyond, its slice or node are busy.

    Within: the bytes of a ring over the links that lead to the group, of a torus those along the
    axes on which the group lies (taken to wrap). Beyond, with g devices of the group in each of m
    parts: each sends 1/g of what crosses, (m - 1)/m of the payload, over its own port.
    """
    chip = target.chip
    group = [places[i] for i in collective.devices]
    here = [p for p in group if p.part == group[0].part]
    parts = len({p.part for p in group})
    port = chip.outside / chip.devices
    if collective.kind == "collective-permute" and parts > 1:
        return 0.0, collective.bytes / port
    along, axes = 1, 1
    if target.platform == "tpu":
        sizes = [int(n) for n in target.shape.split("x") if int(n) > 1]
        axes = max(1, len(sizes))
        columns = zip(*(p.coordinates for p in here), strict=True)
        along = max(1, sum(len(set(column)) > 1 for column in columns))
    inside = collective.bytes / (chip.inside / chip.devices * min(along, axes) / axes)
    if len(here) == 1:
        inside = 0.0
    crossing = collective.payload * collective.times * (parts - 1) / parts / len(here)
    outside = crossing * (2 if collective.kind == "all-reduce" else 1) / port
    return inside, outside
