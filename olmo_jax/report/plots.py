"""Line plots as plain numbers and SVG paths; plot.svg.j2 draws them, style.css colours them.

Not a plotting library: one kind of plot. matplotlib would draw it too, at 97 MB of installation
and 0.5 s, in colours that do not follow the reader's light or dark setting.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from olmo_jax.numerals import tick_text, ticks

WIDTH, HEIGHT = 560, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 30
BOX = {
    "width": WIDTH,
    "left": LEFT,
    "right": WIDTH - RIGHT,
    "top": TOP,
    "height": HEIGHT,
    "bottom": HEIGHT - BOTTOM,
}
"""What plot.svg.j2 draws within."""
MAX_POINTS = 600  # as many as a screen shows; more only makes the page heavy


@dataclass(frozen=True)
class Curve:
    """One line. Steps and values have one shape (N,); a value may be NaN."""

    label: str
    colour: str  # a class of style.css
    steps: np.ndarray
    values: np.ndarray
    smoothed: bool = False  # draws the values faintly, and their moving median over them
    dots: bool = False
    interval: np.ndarray | None = None  # (2, N), low and high: a band about the line


@dataclass(frozen=True)
class Plot:
    """What plot.svg.j2 draws, in the units of its view box."""

    title: str
    curves: list[dict]
    levels: list[dict]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    newest: str
    hover: dict


def make_plot(
    title: str,
    curves: Sequence[Curve],
    text: Callable[[float], str],
    levels: dict[str, float] | None = None,
    from_zero: bool = False,
    names: list[str] | None = None,
) -> Plot | None:
    """A plot of `curves` over the step, with horizontal lines at `levels`; None without a point.

    `text` writes a value for people. With `from_zero` the axis starts at zero. `names` are what
    0, 1, 2, … stand for where the curves are not over steps.
    """
    curves = [curve for curve in curves if np.isfinite(curve.values).any()]
    if not curves:
        return None
    levels = {name: level for name, level in (levels or {}).items() if math.isfinite(level)}
    steps = np.concatenate([curve.steps for curve in curves])
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    # One compilation, or the first steps of a long run, would flatten all the rest: they may leave
    # the frame.
    low = min(0.0, values.min()) if from_zero else min(values.min(), *levels.values(), np.inf)
    high = values.max()
    if not all(curve.dots for curve in curves):
        high = min(high, low + 1.5 * (np.quantile(values, 0.98) - low))
    for curve in curves:
        if curve.interval is not None:
            low, high = min(low, np.nanmin(curve.interval)), max(high, np.nanmax(curve.interval))
    low, high = _padded(low, max(high, *levels.values(), -np.inf), from_zero)
    first, last = float(steps.min()), float(steps.max())
    if first == last:
        first, last = first - 1, last + 1

    def x(step):
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value):
        # Far outside is as good as infinitely far: the clip path hides both.
        share = np.clip((value - low) / (high - low), -1, 2)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    drawn, hover = [], []
    for curve in curves:
        steps, values = _thinned(curve.steps, curve.values)
        smooth = curve.smoothed and np.isfinite(curve.values).sum() >= 30
        if smooth:
            middle_steps, medians = _moving_median(curve.steps, curve.values)
        drawn.append(
            {
                "label": curve.label,
                "colour": curve.colour,
                "faint": _path(x(steps), y(values)) if smooth else "",
                "path": _path(x(middle_steps), y(medians))
                if smooth
                else _path(x(steps), y(values)),
                "band": _band(x(curve.steps), y(curve.interval))
                if curve.interval is not None
                else "",
                "dots": [
                    (round(float(x(s)), 1), round(float(y(v)), 1))
                    for s, v in zip(steps, values, strict=True)
                    if math.isfinite(v) and (len(steps) <= 40 if curve.dots else len(steps) == 1)
                ],
            }
        )
        finite = np.isfinite(values)
        hover.append(
            {
                "label": curve.label,
                "colour": curve.colour,
                "steps": [int(step) for step in steps[finite]],
                "y": [round(float(v), 1) for v in y(values[finite])],
                "text": [text(float(v)) for v in values[finite]],
            }
        )
    newest = curves[0].values[np.isfinite(curves[0].values)][-1]
    return Plot(
        title=title,
        curves=drawn,
        levels=_placed_levels([(name, level, float(y(level))) for name, level in levels.items()]),
        x_ticks=[(round(float(x(t)), 1), name) for t, name in enumerate(names)]
        if names
        else [(round(float(x(t)), 1), tick_text(t)) for t in ticks(first, last, 6) if t >= 0],
        y_ticks=[(round(float(y(t)), 1), tick_text(t)) for t in ticks(low, high, 5)],
        newest=text(float(newest)),
        hover={
            "first": first,
            "last": last,
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "names": names,
            "curves": hover,
        },
    )


def _padded(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


def _placed_levels(levels: list[tuple[str, float, float]]) -> list[dict]:
    """Labels above their lines, each at least a line of text from the one before."""
    placed: list[dict] = []
    for name, level, y in sorted(levels, key=lambda entry: -entry[2]):
        text_y = y - 5
        if placed and placed[-1]["text_y"] - text_y < 14:
            text_y = placed[-1]["text_y"] - 14
        placed.append(
            {"label": f"{name} {level:.2f}", "y": round(y, 1), "text_y": round(text_y, 1)}
        )
    return placed


def _moving_median(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median over a fortieth of the run, at evenly spread steps; NaNs are left out."""
    at = np.unique(np.linspace(0, len(values) - 1, MAX_POINTS // 2).round().astype(int))
    # Shorter towards the ends, on both sides, so that the line does not lag a falling loss.
    reach = np.minimum(max(1, len(values) // 80), np.minimum(at, len(values) - 1 - at))
    windows = [values[i - r : i + r + 1] for i, r in zip(at, reach, strict=True)]
    medians = [np.median(w[np.isfinite(w)]) if np.isfinite(w).any() else np.nan for w in windows]
    return steps[at], np.array(medians)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: the lowest and the highest of each stretch, so spikes stay."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    keep = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), MAX_POINTS // 2 - 1):
        finite = stretch[np.isfinite(values[stretch])]
        if finite.size == 0:
            keep.add(int(stretch[0]))  # a NaN: the line is broken here
        else:
            keep.add(int(finite[np.argmin(values[finite])]))
            keep.add(int(finite[np.argmax(values[finite])]))
    kept = sorted(keep)
    return steps[kept], values[kept]


def _band(x: np.ndarray, y_2: np.ndarray) -> str:
    """A closed SVG path along the lows and back along the highs; without values no path."""
    known = np.isfinite(y_2).all(axis=0)
    x, (low, high) = x[known], y_2[:, known]
    path = _path(np.concatenate([x, x[::-1]]), np.concatenate([low, high[::-1]]))
    return f"{path}Z" if path else ""


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path that starts anew after each NaN."""
    parts, pen = [], "M"
    for px, py in zip(x, y, strict=True):
        if math.isfinite(py):
            parts.append(f"{pen}{px:.1f} {py:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)
