"""The report of a run: one page of curves, retrieved images and written captions, that needs nothing but itself."""

import base64
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from grr.log import read_metrics

POINTS = 300  # of a curve, at most, however long the run
SIDE = 224  # pixels of a shown image, at most
WIDTH, HEIGHT = 400, 210  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 40, 384, 10, 188  # of the plot inside it

Floats = NDArray[np.float64]
Row = dict[str, Any]


@dataclass
class Retrieval:
    """A sentence and the images nearest to it, best first; correct is the place of the right one, None if missed."""

    query: str
    images: list[Tensor]  # uint8 [3, h, w]
    scores: list[float]
    correct: int | None


@dataclass
class Caption:
    """An image, the caption written for it, and those that people wrote."""

    image: Tensor  # uint8 [3, h, w]
    written: str
    references: list[str]


@dataclass
class Examples:
    retrievals: list[Retrieval]
    captions: list[Caption]


def write_report(folder: Path, *, title: str, examples: Examples | None) -> Path:
    """Write folder/report.html from the metrics.jsonl, config.yaml and manifest.json that are there; returns its path.

    The page holds its images, loads nothing, and works without JavaScript. Curves are thinned to 300 points, keeping
    extremes and ends. It is written aside and renamed when whole, so a reader never meets half of it.
    """
    rows = read_metrics(folder)
    parts = [
        _header(title, rows, _last_step(folder, rows)),
        _key_numbers([row for row in rows if row.get("split") == "validation"]),
        _curves(rows),
        _retrievals(examples.retrievals) if examples else "",
        _captions(examples.captions) if examples else "",
        _files(folder),
    ]
    page = HEAD.replace("TITLE", escape(title)) + "\n".join(part for part in parts if part) + FOOT
    path = folder / "report.html"
    aside = folder / "report.html.part"
    aside.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair cannot be written
    os.replace(aside, path)
    return path


# The parts of the page


def _header(title: str, rows: list[Row], last: int | None) -> str:
    now = datetime.now(UTC)
    facts = [f"written {now.day} {now:%B %Y, %H:%M} UTC"]
    bar = ""
    if rows:
        step, epoch = rows[-1]["step"], rows[-1].get("epoch")
        if epoch is not None:
            facts.insert(0, f"epoch {epoch:.1f}")
        facts.insert(0, f"step {step:,} of {last:,}" if last else f"step {step:,}")
        if last:
            bar = f'<progress value="{step}" max="{last}" aria-label="progress">{step / last:.0%}</progress>'
    facts_html = " <i>·</i> ".join(f"<span>{fact}</span>" for fact in facts)
    empty = "" if rows else "<p>The run has begun; there are no numbers yet.</p>"
    return f"<header><h1>{escape(title)}</h1><p class=facts>{facts_html}</p>{bar}{empty}</header>"


def _last_step(folder: Path, rows: list[Row]) -> int | None:
    """The step at which the run will end, if its config and its numbers tell."""
    try:
        config = OmegaConf.load(folder / "config.yaml")
        epochs, max_steps = (OmegaConf.select(config, f"run.{key}") for key in ("epochs", "max_steps"))
    except Exception:  # whatever is the matter with that file, it may not end a training run
        return None
    ends = [max_steps] if isinstance(max_steps, int) else []
    if isinstance(epochs, int) and rows and rows[-1].get("epoch"):
        ends.append(round(epochs * rows[-1]["step"] / rows[-1]["epoch"]))
    return min(ends, default=None)


def _key_numbers(validations: list[Row]) -> str:
    """The last validation in large figures, each beside what it means or what it was before."""
    if not validations:
        return ""
    now, before = validations[-1], validations[-2] if len(validations) > 1 else None
    candidates = now.get("candidates")
    chance = f"chance {_percent(1 / candidates)}" if candidates else ""
    tiles = []
    for key, label in (("text_to_image", "Sentences that find their image"), ("image_to_text", "Images that find a "
                       "sentence of theirs")):  # fmt: skip
        if _is_number(now.get(f"{key}_r1")):
            deeper = [f"R@{k} {_percent(now[f'{key}_r{k}'])}" for k in (5, 10) if _is_number(now.get(f"{key}_r{k}"))]
            tiles.append((label + ", R@1", _percent(now[f"{key}_r1"]), [chance, *deeper]))
    if _is_number(now.get("caption_exact")):
        tiles.append(("Captions right to the letter", _percent(now["caption_exact"]), _was(before, "caption_exact")))
    for key, label in (("perplexity", "Perplexity"), ("contrastive_loss", "Contrastive loss"), ("loss", "Loss")):
        if _is_number(now.get(key)):
            tiles.append((label, _number(now[key]), _was(before, key)))
    if not tiles:
        return ""
    items = "".join(
        f"<div><dt>{label}</dt><dd><b>{value}</b>{''.join(f'<small>{n}</small>' for n in notes if n)}</dd></div>"
        for label, value, notes in tiles
    )
    among = f", among {candidates:,} candidates" if candidates else ""
    when = f"<p>Validation at step {now['step']:,}{among}.</p>"
    return f"<section><h2>What it can do</h2>{when}<dl>{items}</dl></section>"


def _was(before: Row | None, key: str) -> list[str]:
    if before is None or not _is_number(before.get(key)):
        return []
    value = _percent(before[key]) if key == "caption_exact" else _number(before[key])
    return [f"{value} at step {before['step']:,}"]


def _curves(rows: list[Row]) -> str:
    train, held_out = ([row for row in rows if row.get("split") == split] for split in ("train", "validation"))

    def both(key: str) -> list[Series]:
        return [_series(train, key, "train", "a", noisy=True), _series(held_out, key, "validation", "b")]

    def alone(key: str, *, noisy: bool = False) -> list[Series]:
        return [_series(train, key, "train", "a", noisy=noisy)]

    recalls = [_series(held_out, "text_to_image_r1", "sentence to image", "c", factor=100),
               _series(held_out, "image_to_text_r1", "image to sentence", "d", factor=100)]  # fmt: skip
    charts = [
        _chart("Loss", both("loss"), wide=True),
        _chart("R@1 in %", recalls, wide=True, low=0, high=100),
        _chart("Contrastive loss", both("contrastive_loss"), wide=True),
        _chart("Perplexity", both("perplexity"), wide=True, log=True),
        _chart("Learning rate", alone("lr"), low=0),
        _chart("Gradient norm", alone("grad_norm", noisy=True), log=True),
        _chart("Samples a second", alone("samples_per_second", noisy=True), low=0),
    ]
    if not any(charts):
        return ""
    return ("<section><h2>How it learned</h2><p>Over optimizer steps. A faint point is one line of the training log; "
            "the line through them is their running mean. Perplexity and gradient norm have logarithmic axes.</p>"
            f"<div class=charts>{''.join(charts)}</div></section>")  # fmt: skip


def _retrievals(retrievals: list[Retrieval]) -> str:
    if not retrievals:
        return ""
    items = []
    for one in retrievals:
        found = []
        for place, (image, score) in enumerate(zip(one.images, one.scores, strict=True)):
            right = place == one.correct
            similarity = f"{score:.3f}".replace("-", "−")
            alt = f"found in place {place + 1}, similarity {similarity}{', the right image' if right else ''}"
            mark = f"<b>✓ {similarity}</b>" if right else similarity
            found.append(f"<li{' class=right' if right else ''}>{_image(image, alt)}<span>{mark}</span></li>")
        missed = f"<p>The right image is not among these {len(found)}.</p>" if one.correct is None else ""
        items.append(
            f"<article><blockquote>{escape(one.query)}</blockquote><ol>{''.join(found)}</ol>{missed}</article>"
        )
    return ("<section><h2>A sentence it never saw, and the images it finds</h2><p>Nearest first, with the cosine "
            f"similarity; the right image is outlined.</p><div class=retrievals>{''.join(items)}</div></section>"
            )  # fmt: skip


def _captions(captions: list[Caption]) -> str:
    if not captions:
        return ""
    items = []
    for one in captions:
        first, *others = one.references or [""]
        exact = _words(one.written) in map(_words, one.references)
        written = f"<p class=written>{escape(one.written) or '<i>(nothing)</i>'}"
        written += ' <b class=check title="right to the letter">✓</b></p>' if exact else "</p>"
        more = "".join(f"<li>{escape(other)}</li>" for other in others)
        more = f"<details><summary>{len(others)} more</summary><ul>{more}</ul></details>" if more else ""
        items.append(f"<figure>{_image(one.image, first)}<figcaption>{written}<p class=true>{escape(first)}</p>{more}"
                     "</figcaption></figure>")  # fmt: skip
    return ("<section><h2>An image, and the caption it writes</h2><p>Below each image what the model wrote, then, "
            "smaller, what a person wrote; ✓ where the two are equal.</p>"
            f"<div class=captions>{''.join(items)}</div></section>")  # fmt: skip


def _words(caption: str) -> str:
    return " ".join(caption.split())


def _files(folder: Path) -> str:
    items = ""
    for file in (folder / "config.yaml", folder / "manifest.json"):
        if file.is_file():
            text = escape(file.read_text("utf-8", errors="replace"))
            items += f"<details><summary>{file.name}</summary><pre>{text}</pre></details>"
    return f"<section class=files><h2>What was run</h2>{items}</section>" if items else ""


def _image(image: Tensor, alt: str) -> str:
    """uint8 [3, h, w] -> an <img> that carries its own JPEG, reduced to at most 224 pixels a side."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<img src="data:image/jpeg;base64,{data}" width={picture.width} height={picture.height} '
            f'alt="{escape(alt)}">')  # fmt: skip


# Curves


@dataclass
class Series:
    label: str
    color: str  # a class of the style sheet
    steps: Floats
    values: Floats
    noisy: bool  # its points are drawn faint, and a running mean through them


def _series(rows: list[Row], key: str, label: str, color: str, *, factor: float = 1, noisy: bool = False) -> Series:
    points = [(row["step"], row[key] * factor) for row in rows if _is_number(row.get(key))]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return Series(label, color, steps, values, noisy)


def _chart(title: str, series: Sequence[Series], *, wide: bool = False, log: bool = False, low: float | None = None,
           high: float | None = None) -> str:  # fmt: skip
    """A figure of curves over steps, or nothing if there is no number to draw."""
    if log:
        series = [Series(s.label, s.color, s.steps[s.values > 0], s.values[s.values > 0], s.noisy) for s in series]
    series = [s for s in series if len(s.values)]
    if not series:
        return ""
    y_low, y_high = _range(np.concatenate([s.values for s in series]), log=log, low=low, high=high)
    x_high = max(s.steps.max() for s in series)

    def x(step: float) -> float:
        return LEFT + step / max(x_high, 1) * (RIGHT - LEFT)

    def y(value: float) -> float:
        height = math.log10(value / y_low) / math.log10(y_high / y_low) if log else (value - y_low) / (y_high - y_low)
        return BOTTOM - height * (BOTTOM - TOP)

    axes = ""
    for tick in _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high):
        text = f'<text x={LEFT - 7} y={y(tick):.2f} dy=".35em">{_tick(tick)}</text>'
        axes += f'<g class=tick><path d="M{LEFT} {y(tick):.2f}H{RIGHT}"/>{text}</g>'
    for tick in _ticks(0, x_high):
        if tick == int(tick):
            axes += f"<text class=step x={x(tick):.2f} y={BOTTOM + 17}>{_tick(tick)}</text>"
    curves = "".join(_curve(s, x, y) for s in series)
    legend = "".join(f"<span class={s.color}>{s.label} <output>{_number(_mean(s)[-1])}</output></span>" for s in series)
    spoken = "; ".join(f"{s.label} from {_number(s.values[0])} to {_number(s.values[-1])}" for s in series)
    ends = [math.log10(y_low), math.log10(y_high)] if log else [y_low, y_high]
    scale = json.dumps({"x": [0, max(x_high, 1), LEFT, RIGHT], "y": [*ends, BOTTOM, TOP], "log": log})
    return (f'<figure class="chart{" wide" if wide else ""}"><figcaption><h3>{title}<small></small></h3>'
            f"<p>{legend}</p></figcaption>"
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{title}: {spoken}" data-scale=\'{scale}\'>'
            f'{axes}{curves}<path class=rule d=""/></svg></figure>')  # fmt: skip


def _curve(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    def places(values: Floats) -> list[str]:
        return [f"{x(series.steps[i]):.2f} {y(values[i]):.2f}" for i in _thin(values)]

    points = "".join(f"M{place}h0" for place in places(series.values))
    line = "M" + "L".join(places(_mean(series)))
    kind = "faint" if series.noisy else "points"
    dots = f'<path class="{kind} {series.color}" d="{points}"/>' if series.noisy or len(series.values) <= 60 else ""
    return f'{dots}<path class="line {series.color}" d="{line}"/>'


def _mean(series: Series) -> Floats:
    """The exponential mean of a noisy series over about 1 % of it, unbiased at its beginning; of another, itself."""
    decay = 1 - 1 / max(1, len(series.values) / 100)
    if not series.noisy or decay == 0:
        return series.values
    means, total, weight = np.empty_like(series.values), 0.0, 0.0
    for i, value in enumerate(series.values):
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means[i] = total / weight
    return means


def _thin(values: Floats) -> list[int]:
    """The places of at most 300 values: the ends, and the least and the greatest of each of many stretches."""
    if len(values) <= POINTS:
        return list(range(len(values)))
    stretches = np.array_split(np.arange(len(values)), POINTS // 2 - 1)
    extremes = (stretch[pick(values[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax))
    return sorted({0, len(values) - 1, *map(int, extremes)})


def _range(values: Floats, *, log: bool, low: float | None, high: float | None) -> tuple[float, float]:
    """The ends of an axis: a little beyond the values, unless given."""
    if log:
        margin = max((values.max() / values.min()) ** 0.05, 1.05)
        return float(values.min() / margin), float(values.max() * margin)
    least, most = values.min() if low is None else low, values.max() if high is None else high
    margin = 0.05 * (most - least) or 0.05 * abs(most) or 1.0
    return float(least - margin if low is None else low), float(most + margin if high is None else high)


def _ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart, about so many of them, between two ends."""
    raw = (high - low) / about
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    apart = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [float(f"{k * apart:.12g}") for k in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [t for p in powers for m in steps if low <= (t := m * 10.0**p) <= high]
        if 3 <= len(ticks) <= 6:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 6)] if len(ticks) > 6 else _ticks(low, high)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}\u202f%"


def _number(value: float) -> str:
    """Four digits, as many as one can compare at a glance."""
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return (_scientific(value, 2) if 0 < abs(value) < 1e-3 else f"{value:#.4g}").replace("-", "−")


def _tick(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return (_scientific(value, 0) if 0 < abs(value) < 1e-3 else f"{value:,.10g}").replace("-", "−")


def _scientific(value: float, digits: int) -> str:
    return f"{value:.{digits}e}".replace("e-0", "e-")


HEAD = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --page: #fbfaf7; --card: #fff; --ink: #23262b; --soft: #6a6f78; --line: #e7e3dc;
  --a: #3d6b9e; --b: #c0622d; --c: #2b7d72; --d: #8b5390; --right: #2f855a;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, "DejaVu Serif", serif }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --card: #1d2024; --ink: #e4e2dd; --soft: #989ca4;
  --line: #30343a; --a: #7fabdc; --b: #e39360; --c: #62b8a9; --d: #c48fc8; --right: #62c08f } }
* { box-sizing: border-box; margin: 0 }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; font-variant-numeric: tabular-nums lining-nums; max-width: 1120px; margin: auto;
  padding: 40px 24px 64px; overflow-wrap: anywhere; -webkit-text-size-adjust: 100% }
h1, h2, blockquote, .written { font-family: var(--serif) }
h1 { font-size: 32px; font-weight: 500; line-height: 1.2; letter-spacing: -.01em; text-wrap: balance }
h2 { font-size: 21px; font-weight: 500; line-height: 1.3; text-wrap: balance }
header p, section > p { color: var(--soft); margin-top: 4px }
section > p { max-width: 68ch }
header { padding-bottom: 24px }
.facts span { white-space: nowrap }
.facts i { font-style: normal; padding: 0 4px }
progress { appearance: none; display: block; width: 100%; height: 3px; margin-top: 16px; border: 0;
  background: var(--line) }
progress::-webkit-progress-bar { background: var(--line) }
progress::-webkit-progress-value { background: var(--a) }
progress::-moz-progress-bar { background: var(--a) }
section { padding: 24px 0 40px; border-top: 1px solid var(--line) }
header:has(progress) + section { border-top: 0; padding-top: 8px }
dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: 28px 32px; margin-top: 24px }
dl div { display: flex; flex-direction: column }
dt { color: var(--soft); font-size: 13px; line-height: 1.35 }
dd b { display: block; font-size: 38px; font-weight: 300; line-height: 1.2; letter-spacing: -.02em }
dd small { color: var(--soft); font-size: 13px; margin-right: 1.1em; white-space: nowrap }
.charts { display: grid; grid-template-columns: repeat(6, 1fr); gap: 32px 28px; margin-top: 24px }
.chart { grid-column: span 2; min-width: 0 }
.chart.wide { grid-column: span 3 }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; align-items: baseline }
h3 { font-size: 14px; font-weight: 600 }
h3 small { color: var(--soft); font-weight: 400; font-size: 12px; margin-left: 8px }
.chart p { font-size: 12px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 0 14px }
.chart span { white-space: nowrap }
.chart span::before { content: ""; display: inline-block; width: 12px; height: 2px; vertical-align: middle;
  margin-right: 6px; background: currentColor }
.chart output { color: var(--ink) }
span.a { color: var(--a) } span.b { color: var(--b) } span.c { color: var(--c) } span.d { color: var(--d) }
svg { display: block; width: 100%; height: auto; margin-top: 6px; overflow: visible; touch-action: pan-y }
svg text { fill: var(--soft); font-size: 11px; text-anchor: end }
svg text.step { text-anchor: middle }
.wide svg text { font-size: 8.5px }
path { fill: none; stroke-linecap: round; stroke-linejoin: round; vector-effect: non-scaling-stroke }
.tick path { stroke: var(--line); stroke-width: 1 }
path.line { stroke-width: 1.75 } path.points { stroke-width: 5 } path.faint { stroke-width: 3; opacity: .3 }
path.a { stroke: var(--a) } path.b { stroke: var(--b) } path.c { stroke: var(--c) } path.d { stroke: var(--d) }
path.rule { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3 }
img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; background: var(--line);
  border-radius: 4px }
.retrievals { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 36px 40px; margin-top: 24px }
article { display: flex; flex-direction: column }
blockquote { font-size: 17px; line-height: 1.35; margin-bottom: 12px }
blockquote::before { content: "“" } blockquote::after { content: "”" }
ol { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 10px; list-style: none;
  padding: 0; margin-top: auto }
ol span { display: block; font-size: 12px; color: var(--soft); text-align: center; margin-top: 6px }
.right img { outline: 3px solid var(--right); outline-offset: 2px }
.right b, .check { color: var(--right); font-weight: 600 }
article p { font-size: 13px; color: var(--soft); margin-top: 4px }
.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 32px 24px;
  margin-top: 24px }
.written { font-size: 16px; line-height: 1.35; margin-top: 10px }
.written i { color: var(--soft) }
.true, .captions details { font-size: 13px; line-height: 1.4; color: var(--soft); margin-top: 6px }
.captions ul { padding-left: 16px }
summary { cursor: pointer }
.files details { margin-top: 12px }
pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  padding: 12px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 4px; margin-top: 8px }
@media (max-width: 760px) {
  body { padding: 24px 16px 40px }
  h1 { font-size: 26px }
  dl { grid-template-columns: repeat(2, 1fr); gap: 24px 20px }
  dd b { font-size: 32px }
  dd small { display: block }
  .charts, .retrievals { grid-template-columns: minmax(0, 1fr) }
  .chart, .chart.wide { grid-column: auto }
  .wide svg text { font-size: 11px }
  ol { gap: 8px }
  .captions { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 24px 16px }
}
</style>
</head>
<body>
"""

FOOT = r"""
<script>
// The values at the pointer; without it each curve shows its last.
for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg"), { x, y, log } = JSON.parse(svg.dataset.scale);
  const rule = svg.querySelector(".rule"), step = figure.querySelector("h3 small");
  const outputs = [...figure.querySelectorAll("output")], last = outputs.map(output => output.textContent);
  const curves = [...svg.querySelectorAll(".line")].map(path =>
    [...path.getAttribute("d").matchAll(/([\d.]+) ([\d.]+)/g)].map(([, px, py]) => [+px, +py]));
  const invert = (p, [low, high, from, to]) => low + (p - from) / (to - from) * (high - low);
  svg.onpointermove = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const near = curves.map(points => points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    near.forEach(([, py], i) => {
      const value = log ? 10 ** invert(py, y) : invert(py, y);
      outputs[i].textContent = value >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(4);
    });
    step.textContent = "step " + Math.round(invert(near[0][0], x)).toLocaleString("en");
    rule.setAttribute("d", `M${near[0][0]} ${y[3]}V${y[2]}`);
  };
  svg.onpointerleave = () => {
    outputs.forEach((output, i) => output.textContent = last[i]);
    step.textContent = "";
    rule.setAttribute("d", "");
  };
}
</script>
</body>
</html>
"""
