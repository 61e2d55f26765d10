"""An outlook in words and numbers: the rows that the terminal and the page have in common."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from olmo_jax.numerals import count_text
from olmo_jax.plan.roofline import Outlook, names
from olmo_jax.plan.targets import parse_target

GIB = 1024**3


def rows(outlook: Outlook) -> dict[str, str]:
    """{what: value} of one outlook, in reading order."""
    o = outlook
    inside, outside = names(parse_target(o.target))
    out = {
        "target": f"{o.target}: {o.about}",
        "mesh": ", ".join(f"{axis} {n}" for axis, n in o.mesh.items()) or "one device",
        "batch": f"{o.batch_size:,} x {o.sequence_length:,}"
        + (f", micro-batch {o.micro_batch_size:,}" if o.micro_batch_size else ""),
        "remat, attention": f"{o.remat}, {o.kernels['attention']}",
        "parameters": count_text(o.parameters),
    }
    for use, n in o.memory.items():
        if n:
            out[f"  {use} a device"] = gib(n)
    left = o.memory_there - o.memory_needed
    out["memory a device"] = f"{gib(o.memory_needed)} of {gib(o.memory_there)}"
    out["fits"] = f"yes, {gib(left)} to spare" if o.fits else f"NO, {gib(-left)} too much"
    out["FLOPs a device"] = f"{o.flops_device:.4g}" + (
        f" ({o.flops_kernels / o.flops:.1%} in attention)" if o.flops_kernels else ""
    )
    if o.bound is not None and o.bound_seconds and o.memory_traffic is not None:
        out["bytes moved a device"] = count_text(o.memory_traffic)
        for axis, size in sorted(o.collective_bytes.items(), key=lambda item: -item[1]):
            if size >= 1e5:
                out[f"  sent over {axis}"] = count_text(size)
        for label, part in (
            ("compute", "compute"),
            ("memory bandwidth", "memory"),
            (inside, "inside"),
            (outside, "outside"),
        ):
            if o.bound[part]:
                out[f"  seconds for {label}"] = f"{o.bound[part]:.4g}"
        out["bound of a step"] = f"{o.bound_seconds:.4g} s, by {o.bound_by}"
        out["tokens/s at the bound"] = f"{o.tokens_per_second:,.0f}"
        out["  a chip"] = f"{o.tokens_per_second / o.chips:,.0f}"  # type: ignore[operator]
        out["MFU at the bound"] = f"{o.mfu:.1%}"
        assert o.days is not None and o.carbon_kg is not None
        out[f"{count_text(o.tokens)} tokens"] = (
            f"{o.days:,.1f} days, {o.chip_hours:,.0f} chip-hours"
        )
        out["energy"] = f"{o.energy_kwh:,.0f} kWh"
        out["carbon"] = f"{o.carbon_kg / 1000:,.2f} t CO2e"
    out["compiled in"] = f"{o.compile_seconds:.0f} s" + (" (kept)" if o.cached else "")
    return out


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def terminal_table(outlooks: Sequence[Outlook]) -> Table:
    """One outlook a column."""
    table = Table(box=SIMPLE_HEAD, title="plan: the step as compiled", title_justify="left")
    table.add_column("")
    for o in outlooks:
        table.add_column(o.name, justify="right", overflow="fold")
    columns = [rows(o) for o in outlooks]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    for key in keys:
        values = [column.get(key, "") for column in columns]
        style = "bold" if not key.startswith(" ") else ""
        if key == "fits":
            values = [f"[{'green' if v.startswith('yes') else 'red'}]{v}" for v in values]
        table.add_row(f"[{style}]{key}" if style else key, *values)
    return table


def assumptions(outlook: Outlook) -> str:
    """One line: what energy and carbon rest on."""
    a = outlook.assumptions
    return (
        f"energy: {a['chip_watts']:g} W a chip + {a['host_watts_per_chip']:g} W of its host, "
        f"PUE {a['pue']:g}; carbon: {a['grid_gco2_per_kwh']:g} g CO2e/kWh"
    )


def ranking(outlooks: Sequence[Outlook], given: Sequence[str]) -> Table:
    """One outlook a row, the best first; `given` says what each tried."""
    table = Table(box=SIMPLE_HEAD, title="plan search: best first", title_justify="left")
    heads = ("", "memory", "fits", "bound s", "by", "tokens/s", "MFU at the bound")
    for head in heads:
        table.add_column(head, justify="left" if head in ("", "by") else "right")
    for o, what in zip(outlooks, given, strict=True):
        speed = o.tokens_per_second
        table.add_row(
            what,
            gib(o.memory_needed),
            "[green]yes" if o.fits else "[red]no",
            f"{o.bound_seconds:.4g}" if o.bound_seconds else "",
            o.bound_by or "",
            f"{speed:,.0f}" if speed else "",
            f"{o.mfu:.1%}" if o.mfu else "",
        )
    return table
