"""Charts of curves over optimizer steps, as figures of a page, and the format of numbers."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from grr.training.log import LogLine, is_number

POINTS = 300  # of a curve, at most, however long the run
WIDTH, HEIGHT = 400, 240  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 40, 384, 28, 206  # of the plot inside it
COLORS = "abcdefghij"  # classes of the style sheet

Floats = NDArray[np.float64]


@dataclass
class Series:
    """A curve: plain; noisy, which is faint points and their running mean; or thin, without a place in the legend."""

    label: str
    color: str  # one of COLORS
    steps: Floats
    values: Floats
    style: Literal["plain", "noisy", "thin"] = "plain"


def series(
    rows: Sequence[LogLine],
    key: str,
    label: str,
    color: str,
    *,
    factor: float = 1,
    style: Literal["plain", "noisy", "thin"] = "plain",
) -> Series:
    """Returns the curve of one key of some log lines, without those where it is not a finite number."""
    points = [(row["step"], row[key] * factor) for row in rows if is_number(row.get(key))]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return Series(label, color, steps, values, style)


@dataclass
class Level:
    """A value to compare curves with, a dashed line across the chart."""

    label: str
    value: float
    color: str = "soft"  # one of COLORS, or that of the axes


def chart(
    title: str,
    curves: Sequence[Series],
    *,
    unit: str,
    wide: bool = False,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
    levels: Sequence[Level] = (),
    best_step: int | None = None,
) -> str:
    """A figure of curves over optimizer steps; nothing if there is no number to draw.

    unit: the name of the vertical axis; low, high: its ends, where they are fixed; levels: values to compare the curves
    with; best_step: that of the weights that the run keeps, a vertical line.
    """
    if log:
        curves = [replace(s, steps=s.steps[s.values > 0], values=s.values[s.values > 0]) for s in curves]
    curves = [s for s in curves if len(s.values)]
    if not curves:
        return ""
    values = [s.values for s in curves] + [np.array([level.value]) for level in levels]
    y_low, y_high = _range(np.concatenate(values), log=log, low=low, high=high)
    x_high = max(s.steps.max() for s in curves)

    def x(step: float) -> float:
        return LEFT + step / max(x_high, 1) * (RIGHT - LEFT)

    def y(value: float) -> float:
        height = math.log10(value / y_low) / math.log10(y_high / y_low) if log else (value - y_low) / (y_high - y_low)
        return BOTTOM - height * (BOTTOM - TOP)

    axes = f"<text class=unit x={LEFT} y={TOP - 16}>{escape(unit)}</text>"
    axes += f"<text class=unit-of-steps x={RIGHT} y={BOTTOM + 31}>optimizer step</text>"
    marks = log_ticks(y_low, y_high) if log else ticks(y_low, y_high)
    scientific = any(0 < abs(tick) < 1e-3 for tick in marks)
    for tick in marks:
        text = f'<text x={LEFT - 7} y={y(tick):.2f} dy=".35em">{tick_label(tick, scientific=scientific)}</text>'
        axes += f'<g class=tick><path d="M{LEFT} {y(tick):.2f}H{RIGHT}"/>{text}</g>'
    for tick in ticks(0, x_high):
        if tick == int(tick):
            axes += f"<text class=step x={x(tick):.2f} y={BOTTOM + 17}>{tick_label(tick)}</text>"
    kept = best_step is not None and best_step <= x_high
    axes += _levels(levels, y, "right" if kept and x(best_step or 0) < (LEFT + RIGHT) / 2 else "left")
    if best_step is not None and kept:
        axes += _best(best_step, x)
    lines = "".join(_curve(s, x, y) for s in curves)
    named = [(escape(s.label), s) for s in curves if s.style != "thin"]
    legend = "".join(f"<span class={s.color}>{n} <output>{number(_mean(s)[-1])}</output></span>" for n, s in named)
    summary = "; ".join(f"{n} from {number(s.values[0])} to {number(s.values[-1])}" for n, s in named)
    ends = [math.log10(y_low), math.log10(y_high)] if log else [y_low, y_high]
    scale = json.dumps({"x": [0, max(x_high, 1), LEFT, RIGHT], "y": [*ends, BOTTOM, TOP], "log": log})
    return (
        f'<figure class="chart{" wide" if wide else ""}"><figcaption><h3>{title}<small></small></h3>'
        f"<p>{legend}</p></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{title}: {summary}" data-scale=\'{scale}\'>'
        f'{axes}{lines}<path class=rule d=""/></svg></figure>'
    )


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}\u202f%"


def number(value: float) -> str:
    """A number with four significant digits."""
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    text = f"{value:.2e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:#.4g}"
    return text.replace("-", "−")


def _best(step: int, x: Callable[[float], float]) -> str:
    """The vertical line of the step that is kept, with its label beside its upper end, clear of the axis' name."""
    side, dx = ("right", -3) if x(step) > (LEFT + RIGHT) / 2 else ("left", 3)
    text = f"<text class={side} x={max(x(step) + dx, LEFT + 60):.2f} y={TOP - 16}>kept: step {step:,}</text>"
    return f'<g class=best><path d="M{x(step):.2f} {TOP - 24}V{BOTTOM}"/>{text}</g>'


def _levels(levels: Sequence[Level], y: Callable[[float], float], side: Literal["left", "right"]) -> str:
    """The lines of some levels, with their labels at one side, away from the line of the step that is kept.

    Of two that are close the label of the lower one is below its line.
    """
    parts = ""
    x = LEFT + 3 if side == "left" else RIGHT
    above = -math.inf
    for level in sorted(levels, key=lambda level: -level.value):
        height = y(level.value)
        dy = "1.1em" if height - above < 16 and height + 12 < BOTTOM else "-.4em"
        parts += f'<g class="level {level.color}"><path d="M{LEFT} {height:.2f}H{RIGHT}"/>'
        parts += f'<text class={side} x={x} y={height:.2f} dy="{dy}">{escape(level.label)}</text></g>'
        above = height
    return parts


def _curve(curve: Series, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    def places(values: Floats) -> list[str]:
        return [f"{x(curve.steps[i]):.2f} {y(values[i]):.2f}" for i in _thin(values)]

    points = "".join(f"M{place}h0" for place in places(curve.values))
    line = "M" + "L".join(places(_mean(curve)))
    if curve.style == "thin":
        return f'<path class="thin {curve.color}" d="{line}"/>'
    noisy = curve.style == "noisy"
    kind = "faint" if noisy else "points"
    dots = f'<path class="{kind} {curve.color}" d="{points}"/>' if noisy or len(curve.values) <= 60 else ""
    return f'{dots}<path class="line {curve.color}" d="{line}"/>'


def _mean(curve: Series) -> Floats:
    """The exponential mean of a noisy curve over about 1 % of it, unbiased at its beginning; other curves unchanged."""
    decay = 1 - 1 / max(1, len(curve.values) / 100)
    if curve.style != "noisy" or decay == 0:
        return curve.values
    means, total, weight = np.empty_like(curve.values), 0.0, 0.0
    for i, value in enumerate(curve.values):
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means[i] = total / weight
    return means


def _thin(values: Floats) -> list[int]:
    """The places of at most 300 values: the two ends, and the minimum and maximum of each of many stretches."""
    if len(values) <= POINTS:
        return list(range(len(values)))
    stretches = np.array_split(np.arange(len(values)), POINTS // 2 - 1)
    extremes = (stretch[pick(values[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax))
    return sorted({0, len(values) - 1, *map(int, extremes)})


def _range(values: Floats, *, log: bool, low: float | None, high: float | None) -> tuple[float, float]:
    """The ends of an axis: 5 % beyond the values, unless fixed."""
    if log:
        margin = max((values.max() / values.min()) ** 0.05, 1.05)
        return float(values.min() / margin), float(values.max() * margin)
    least, most = values.min() if low is None else low, values.max() if high is None else high
    margin = 0.05 * (most - least) or 0.05 * abs(most) or 1.0
    return float(least - margin if low is None else low), float(most + margin if high is None else high)


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """About so many round numbers between two ends, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    apart = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [float(f"{k * apart:.12g}") for k in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """About three to six round numbers between two ends of a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        marks = [t for p in powers for m in steps if low <= (t := m * 10.0**p) <= high]
        if 3 <= len(marks) <= 6:
            return marks
    return marks[:: math.ceil(len(marks) / 6)] if len(marks) > 6 else ticks(low, high)


def tick_label(value: float, *, scientific: bool = False) -> str:
    """The label of a tick; scientific: in the notation 5e−4, which all ticks of an axis have or none has."""
    if scientific and value:
        mantissa, exponent = f"{value:.10e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:,.10g}".replace("-", "−")
