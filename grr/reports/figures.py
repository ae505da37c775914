"""Figures of a comparison as SVG files: learning curves, and differences with their intervals."""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from statistics import fmean
from typing import NamedTuple

from grr.experiments.compare import Comparison
from grr.experiments.metrics import Metric
from grr.experiments.runs import RunRecord
from grr.experiments.statistics import Difference
from grr.reports.charts import COLORS, log_ticks, tick_label, ticks
from grr.reports.page import HERE
from grr.training.log import is_number

WIDTH, HEIGHT = 720, 300  # of a figure, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 704, 34, 254  # of the plot of curves
LIGHT, DARK = 0, 1  # themes
NAMES = 300  # room for the labels of differences
ROW = 30  # height of one difference


class Row(NamedTuple):
    """A difference to draw, in percent of the first model's mean."""

    label: str
    difference: Difference
    scale: float  # percent of the first model's mean in a unit of the metric


def curves_figure(comparison: Comparison, metric: Metric) -> str:
    """Returns the validation curves of a metric of the log: a thin line for each seed, a thick one for their mean."""
    curves = {name: [_points(run, metric) for run in runs] for name, runs in comparison.models.items()}
    values = [y for of_model in curves.values() for points in of_model for _, y in points]
    if not values or metric.task is not None:
        return ""
    log = min(values) > 0 and max(values) / min(values) > 5
    low, high = (min(values), max(values)) if log else (min(values) - 0.05 * _span(values), max(values))
    last = max(x for of_model in curves.values() for points in of_model for x, _ in points)

    def x(step: float) -> float:
        return LEFT + step / last * (RIGHT - LEFT)

    def y(value: float) -> float:
        part = math.log(value / low) / math.log(high / low) if log else (value - low) / ((high - low) or 1)
        return BOTTOM - part * (BOTTOM - TOP)

    body = f'<text x="{LEFT}" y="18">{escape(metric.label)}, validation{" (logarithmic)" if log else ""}</text>'
    for tick in log_ticks(low, high) if log else ticks(low, high):
        body += f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>'
        body += f'<text class="end" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">{tick_label(tick)}</text>'
    for tick in ticks(0, last):
        body += f'<text class="middle" x="{x(tick):.1f}" y="{BOTTOM + 18}">{tick_label(tick)}</text>'
    body += f'<text class="end" x="{RIGHT}" y="{BOTTOM + 36}">optimizer step</text>'
    legend = LEFT
    for i, (name, of_model) in enumerate(curves.items()):
        for points in of_model:
            body += _line(points, x, y, f"thin c{i % len(COLORS)}")
        body += _line(_mean(of_model), x, y, f"thick c{i % len(COLORS)}")
        body += f'<path class="thick c{i % len(COLORS)}" d="M{legend} {BOTTOM + 32}h18"/>'
        body += f'<text x="{legend + 24}" y="{BOTTOM + 36}">{escape(name)}</text>'
        legend += 44 + 7 * len(name)
    return svg(body, HEIGHT)


def differences_figure(comparison: Comparison) -> str:
    """Returns the differences of the endpoints from the first model, or, of a factorial design, the effects on the
    primary metric: the mean with its 95 % interval, in percent of the first model's mean."""
    base = {line.metric.name: line.spreads[0] for line in comparison.lines}
    rows = []
    for endpoint in comparison.endpoints if not comparison.factorial else ():
        spread, difference = base.get(endpoint.metric.name), endpoint.difference
        if spread and spread.mean and difference and difference.interval:
            arrow = "↓" if endpoint.metric.lower_is_better else "↑"
            label = f"{endpoint.metric.label.removesuffix(', %')} {arrow}"
            label = label if len(comparison.models) == 2 else f"{endpoint.model}: {label}"
            rows.append(Row(label, difference, 100 / spread.mean))
    for metric, effects in comparison.factorial[:1]:
        spread = base.get(metric.name)
        for effect in effects if spread and spread.mean else ():
            label = " × ".join(f"{f.changed}" for f in effect.factors)
            rows.append(Row(label, effect.difference, 100 / spread.mean if spread else 0))
    return _forest(rows, next(iter(comparison.models))) if rows else ""


def _forest(rows: Sequence[Row], first: str) -> str:
    """Returns a row for each difference: its label, its interval as a line, and its mean as a dot."""
    ends = [row.scale * end for row in rows for end in row.difference.interval or ()] + [0.0]
    low, high = min(ends) - 0.05 * _span(ends), max(ends) + 0.05 * _span(ends)
    bottom = TOP + ROW * len(rows)

    def x(percent: float) -> float:
        return NAMES + (percent - low) / (high - low) * (RIGHT - NAMES)

    body = f'<text x="{NAMES}" y="18">change against {escape(first)}, %, and its 95 % interval</text>'
    for tick in ticks(low, high):
        kind = "zero" if tick == 0 else "grid"
        body += f'<path class="{kind}" d="M{x(tick):.1f} {TOP}V{bottom}"/>'
        body += f'<text class="middle" x="{x(tick):.1f}" y="{bottom + 18}">{tick_label(tick)}</text>'
    for i, (label, difference, scale) in enumerate(rows):
        if difference.interval is None:
            continue
        y = TOP + ROW * (i + 0.5)
        start, end = (x(scale * bound) for bound in difference.interval)
        body += f'<text class="end" x="{NAMES - 12}" y="{y + 4}">{escape(label)}</text>'
        body += f'<path class="thick c0" d="M{start:.1f} {y}H{end:.1f}"/>'
        body += f'<circle class="c0" cx="{x(scale * difference.mean):.1f}" cy="{y}" r="4.5"/>'
    return svg(body, bottom + 28)


def svg(body: str, height: float) -> str:
    """Returns a file of a figure, in the colours of the pages: light or dark, as the reader's system is."""
    light, dark = (_colors(theme) for theme in (LIGHT, DARK))
    # every rule names .figure, so that a figure inside a page changes nothing else on it
    style = _scoped(
        "text{font:12px system-ui,sans-serif;text-anchor:start}.end{text-anchor:end}.middle{text-anchor:middle}"
        "path{fill:none;stroke-linecap:round;stroke-linejoin:round}.thin{stroke-width:.75;opacity:.5}.thick{stroke-width:2}"
        + light
    )
    style += f"@media (prefers-color-scheme:dark){{{_scoped(dark)}}}"
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" style="max-width:{WIDTH}px"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" {size}><style>{style}</style>'
        f'<rect width="{WIDTH}" height="{height}"/>{body}</svg>\n'
    )


def _colors(theme: int) -> str:
    """Returns the rules of the colours of a theme."""
    known = {name: found[theme] for name in ("card", "ink", "soft", "line", *COLORS) if (found := _palette(name))}
    series = "".join(f"circle.c{i}{{fill:{known[c]}}}path.c{i}{{stroke:{known[c]}}}" for i, c in enumerate(COLORS))
    axes = f".grid{{stroke:{known['line']}}}.zero{{stroke:{known['soft']}}}"
    return f"text{{fill:{known['ink']}}}rect{{fill:{known['card']}}}{axes}{series}"


@cache
def _palette(name: str) -> list[str]:
    """Returns the values of a colour of the style sheet of pages: light, dark."""
    return re.findall(rf"--{name}: (#[0-9a-f]+)", (HERE / "page.css").read_text(encoding="utf-8"))


def _scoped(rules: str) -> str:
    return re.sub(r"(^|})(?=[^}])", r"\1.figure ", rules)


def _line(
    points: Sequence[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float], kind: str
) -> str:
    places = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
    return f'<path class="{kind}" d="M{places}"/>' if points else ""


def _points(run: RunRecord, metric: Metric) -> list[tuple[float, float]]:
    rows = (row for row in run.validations if is_number(row.get(metric.key)))
    return [(float(row["step"]), float(row[metric.key]) * metric.factor) for row in rows]


def _mean(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Returns the mean of some curves at the steps that all have."""
    by_step = [dict(points) for points in curves]
    steps = sorted(set.intersection(*map(set, by_step)))
    return [(step, fmean(points[step] for points in by_step)) for step in steps]


def _span(values: Sequence[float]) -> float:
    return (max(values) - min(values)) or abs(max(values)) or 1.0
