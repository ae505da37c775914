"""A page that needs nothing but itself: its style, the script of its charts, and how it is written."""

import os
from datetime import UTC, datetime
from html import escape
from pathlib import Path


def write_page(path: Path, title: str, *parts: str) -> Path:
    """Write an HTML page of these parts, one below the other, and return its path.

    The page loads nothing, and works without JavaScript. It is written aside and renamed when whole, so a reader never
    meets half of it. The title may be any text; parts are HTML, whatever they quote escaped already.
    """
    page = HEAD.replace("TITLE", escape(title)) + "\n".join(part for part in parts if part) + FOOT
    aside = path.with_name(path.name + ".part")
    aside.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair cannot be written
    os.replace(aside, path)
    return path


def header(title: str, *facts: str, below: str = "") -> str:
    """The top of a page: a title, which may be any text, facts in one line, when it was written, what stands below."""
    now = datetime.now(UTC)
    facts = *map(escape, facts), f"written {now.day} {now:%B %Y, %H:%M} UTC"
    shown = " <i>·</i> ".join(f"<span>{fact}</span>" for fact in facts)
    return f"<header><h1>{escape(title)}</h1><p class=facts>{shown}</p>{below}</header>"


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
  --a: #3d6b9e; --b: #c0622d; --c: #2b7d72; --d: #8b5390; --e: #a9841c; --f: #b8456a; --g: #5b7f2b; --h: #6f6ac4;
  --i: #7a6a5c; --j: #2d93ad; --right: #2f855a;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, "DejaVu Serif", serif }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --card: #1d2024; --ink: #e4e2dd; --soft: #989ca4;
  --line: #30343a; --a: #7fabdc; --b: #e39360; --c: #62b8a9; --d: #c48fc8; --e: #d5b04c; --f: #e8839f; --g: #9dbf68;
  --h: #a5a1ee; --i: #b5a595; --j: #6bc3d9; --right: #62c08f } }
* { box-sizing: border-box; margin: 0 }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; font-variant-numeric: tabular-nums lining-nums; max-width: 1120px; margin: auto;
  padding: 40px 24px 64px; overflow-wrap: anywhere; -webkit-text-size-adjust: 100% }
h1, h2, blockquote, .asked span, .written { font-family: var(--serif) }
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
.a { --color: var(--a) } .b { --color: var(--b) } .c { --color: var(--c) } .d { --color: var(--d) }
.e { --color: var(--e) } .f { --color: var(--f) } .g { --color: var(--g) } .h { --color: var(--h) }
.i { --color: var(--i) } .j { --color: var(--j) }
.chart span { color: var(--color) }
svg { display: block; width: 100%; height: auto; margin-top: 6px; overflow: visible; touch-action: pan-y }
svg text { fill: var(--soft); font-size: 11px; text-anchor: end }
svg text.step { text-anchor: middle }
.wide svg text { font-size: 8.5px }
path { fill: none; stroke-linecap: round; stroke-linejoin: round; vector-effect: non-scaling-stroke }
.tick path { stroke: var(--line); stroke-width: 1 }
.line, .points, .faint, .thin { stroke: var(--color) }
.line { stroke-width: 1.75 } .points { stroke-width: 5 } .faint { stroke-width: 3; opacity: .3 }
.thin { stroke-width: .75; opacity: .6 }
.level path { stroke: var(--color); stroke-width: 1; stroke-dasharray: 6 4 }
.level text { fill: var(--color); text-anchor: end; font-size: 9px }
.best { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 6 4 }
.rule { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3 }
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
.hits { display: grid; gap: 36px; margin-top: 24px }
.hits ol { grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 20px 16px }
.hits li .name { text-align: center }
.asked { width: 168px; margin-bottom: 16px }
.asked span { display: block; font-size: 17px; line-height: 1.35; margin-bottom: 12px }
.name { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; font-size: 12px;
  line-height: 1.35; color: var(--soft) }
.captions .name, .asked .name { margin-top: 6px }
.gone { display: grid; place-items: center; aspect-ratio: 1; padding: 8px; border: 1px dashed var(--line);
  border-radius: 4px; font-size: 12px; text-align: center; color: var(--soft) }
.scroll { overflow-x: auto; margin-top: 24px }
table { border-collapse: collapse; font-size: 13.5px; white-space: nowrap }
th, td { text-align: right; padding: 5px 0 5px 22px; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 400 }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--page) }
.notes { padding-left: 18px; margin-top: 16px; max-width: 80ch }
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
