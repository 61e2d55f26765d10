"""`olmo-jax plan --html`: one page that asks the network for nothing: memory bars, roofline, table.

The report's look (report/style.css); numbers and their words are show.py's.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo_jax import pages
from olmo_jax.plan.roofline import Outlook
from olmo_jax.plan.show import assumptions, gib, rows
from olmo_jax.plan.targets import parse_target

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
COLOURS = {
    "parameters": "#1f6f8b",
    "optimizer": "#5b6f2f",
    "batch": "#8a6fb0",
    "temporaries": "#c8551b",
    "program": "#888888",
}


def render(outlooks: Sequence[Outlook], title: str = "olmo-jax plan") -> str:
    """The page as HTML."""
    columns = [rows(o) for o in outlooks]
    return pages.render(
        Path(__file__).with_name("page.html.j2"),
        title=title,
        names=[o.name for o in outlooks],
        table=[
            (key.strip(), key.startswith(" "), [column.get(key, "") for column in columns])
            for key in dict.fromkeys(key for column in columns for key in column)
        ],
        bars=memory_bars(outlooks),
        colours=COLOURS,
        roofline=roofline_plot(outlooks),
        notes=list(dict.fromkeys(note for o in outlooks for note in o.notes)),
        assumptions=assumptions(outlooks[0]) if outlooks else "",
    )


def memory_bars(outlooks: Sequence[Outlook]) -> list[dict[str, Any]]:
    """A bar for each outlook, in per cent of the widest of all needs and memories."""
    widest = max((max(o.memory_needed, o.memory_there) for o in outlooks), default=1)
    return [
        {
            "name": o.name,
            "parts": [
                {"use": use, "percent": 100 * n / widest, "text": f"{use} {gib(n)}"}
                for use, n in o.memory.items()
                if n
            ],
            "limit": 100 * o.memory_there / widest,
            "text": f"{gib(o.memory_needed)} of {gib(o.memory_there)}",
            "fits": o.fits,
        }
        for o in outlooks
    ]


def roofline_plot(outlooks: Sequence[Outlook]) -> dict[str, Any] | None:
    """Attainable FLOP/s of a device over FLOPs for each byte of memory traffic, both logarithmic:
    each chip's roof, and each program's point at its bound. None without a bound."""
    points = []
    for o in outlooks:
        if o.bound_seconds and o.memory_traffic:
            chip = parse_target(o.target).chip
            peak, bandwidth = chip.peak / chip.devices, chip.bandwidth / chip.devices
            at = o.flops_device / o.memory_traffic, o.flops_device / o.bound_seconds
            points.append((o, peak, bandwidth, *at))
    if not points:
        return None
    ridges = [peak / bandwidth for _, peak, bandwidth, _, _ in points]
    xs = [x for *_, x, _ in points]
    x_low, x_high = _decades(min(*xs, *ridges) / 3, max(*xs, *ridges) * 3)
    y_low, y_high = _decades(min(y for *_, y in points) / 4, max(p[1] for p in points) * 1.3)

    def x(value: float) -> float:
        share = (math.log10(value) - x_low) / (x_high - x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (math.log10(value) - y_low) / (y_high - y_low)
        return round(HEIGHT - BOTTOM - min(max(share, 0), 1.0) * (HEIGHT - TOP - BOTTOM), 1)

    roofs = {}
    for o, peak, bandwidth, _, _ in points:
        start = max(10**x_low, 10**y_low / bandwidth)
        corners = [(start, start * bandwidth), (peak / bandwidth, peak), (10**x_high, peak)]
        path = "L".join(f"{x(a)} {y(b)}" for a, b in corners)
        roofs[parse_target(o.target).chip.about] = f"M{path}"
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "frame": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        "roofs": roofs,
        "points": [
            {"x": x(a), "y": y(b), "name": o.name, "by": o.bound_by} for o, _, _, a, b in points
        ],
        "x_ticks": [(x(10.0**n), f"{10**n:g}") for n in range(math.ceil(x_low), int(x_high) + 1)],
        "y_ticks": [
            (y(10.0**n), f"1e{n}") for n in range(math.ceil(y_low), math.floor(y_high) + 1)
        ],
    }


def _decades(low: float, high: float) -> tuple[float, float]:
    """Logarithms of a range that has at least one whole power of ten in it."""
    a, b = math.log10(low), math.log10(high)
    return (a, b) if math.ceil(a) <= math.floor(b) else (math.floor(a), math.ceil(b))
