"""Scaling laws as a table and as a figure."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from grr.experiments.scaling import Exponent, ScalingLaw
from grr.reports.charts import COLORS, log_ticks, tick_label
from grr.reports.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, svg
from grr.reports.table import Table


def scaling_table(laws: Mapping[str, ScalingLaw]) -> Table:
    """A row for each group: the exponents with their 95 % intervals, and how well the law fits."""
    rows = [["", "runs", "exponent of parameters", "exponent of samples", "deviation from the law"]]
    for name, law in laws.items():
        deviation = f"{100 * math.expm1(law.residual):.1f} %"
        rows.append([name, str(law.runs), _exponent(law.by_size), _exponent(law.by_samples), deviation])
    return rows


def scaling_figure(
    points: Mapping[str, Sequence[tuple[int, int, float]]], laws: Mapping[str, ScalingLaw], label: str
) -> str:
    """Returns an SVG of the loss of each run over its samples, both logarithmic, and of the law for each size.

    points: parameters, samples and loss of the runs of each group. The larger a model, the larger its dots.
    """
    every = [point for of_group in points.values() for point in of_group]
    sizes = sorted({size for size, _, _ in every})
    drawn = [loss for *_, loss in every]
    drawn += [_loss(laws[name], size, n) for name, of_group in points.items() for size, n, _ in of_group]
    low, high = min(drawn) / 1.1, max(drawn) * 1.1
    first, last = min(samples for _, samples, _ in every) / 1.1, max(samples for _, samples, _ in every) * 1.1

    def x(samples: float) -> float:
        return LEFT + math.log(samples / first) / math.log(last / first) * (RIGHT - LEFT)

    def y(loss: float) -> float:
        return BOTTOM - math.log(loss / low) / math.log(high / low) * (BOTTOM - TOP)

    body = f'<text x="{LEFT}" y="18">{escape(label)}, both axes logarithmic; larger dots are larger models</text>'
    for tick in log_ticks(low, high):
        body += f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>'
        body += f'<text class="end" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">{tick_label(tick)}</text>'
    for samples in sorted({samples for _, samples, _ in every}):
        body += f'<text class="middle" x="{x(samples):.1f}" y="{BOTTOM + 18}">{tick_label(samples)}</text>'
    body += f'<text class="end" x="{RIGHT}" y="{BOTTOM + 36}">training samples</text>'
    legend = LEFT
    for i, (name, of_group) in enumerate(points.items()):
        color, law = f"c{i % len(COLORS)}", laws[name]
        for size in sorted({size for size, _, _ in of_group}):
            seen = [samples for s, samples, _ in of_group if s == size]
            ends = (f"{x(n):.1f} {y(_loss(law, size, n)):.1f}" for n in (min(seen), max(seen)))
            body += f'<path class="thick {color}" d="M{"L".join(ends)}"/>'
        for size, samples, loss in of_group:
            radius = 2 + 1.5 * sizes.index(size) * 3 / max(len(sizes), 3)
            body += f'<circle class="{color}" cx="{x(samples):.1f}" cy="{y(loss):.1f}" r="{radius:.1f}"/>'
        body += f'<path class="thick {color}" d="M{legend} {BOTTOM + 32}h18"/>'
        body += f'<text x="{legend + 24}" y="{BOTTOM + 36}">{escape(name)}</text>'
        legend += 44 + 7 * len(name)
    return svg(body, HEIGHT)


def _loss(law: ScalingLaw, size: float, samples: float) -> float:
    return law.constant * size**-law.by_size.value * samples**-law.by_samples.value


def _exponent(exponent: Exponent) -> str:
    return f"{exponent.value:.3f} [{exponent.low:.3f}, {exponent.high:.3f}]".replace("-", "−")
