"""Model card of a run for the Hugging Face hub: README.md, and its curves as a picture."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image, ImageDraw, ImageFont

from grr.experiments.metrics import METRICS, Metric, values
from grr.experiments.runs import read_run
from grr.inference.hub import PREFIX, card_start, is_hub_name, split_name
from grr.reports.charts import Series, series, tick_label, ticks
from grr.reports.table import markdown
from grr.training.log import read_metrics, read_starts

WIDTH, HEIGHT, MARGIN = 640, 320, 56  # pixels of a plot
COLORS = {"a": "#1f6feb", "b": "#d1242f", "soft": "#9aa4af"}
MOST = 120  # characters of a value in a table


def model_card(name: str, run: Path | None, facts: dict[str, Any], license: str | None) -> str:
    """Returns the README.md of owner/name: how to load the model, its size, and what its run's files say.

    run: the folder of a run; None if the model was moved out of it. facts: the numbers of the model itself, by name.
    License: as the hub spells it; None leaves it open, and the card says so.
    """
    config: Any = {}
    if run is not None and (run / "config.yaml").is_file():
        config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    base = str(config.get("model", {}).get("path") or "")
    metadata = {"license": license, "base_model": split_name(base)[0] if is_hub_name(base) else None}
    parts = [card_start(name, metadata), "## Model", markdown([["", "value"], *rows(facts)])]
    if run is not None:
        parts += _data(config, run) + _training(config, run) + _numbers(run)
        if curves(run):
            parts += ["## Curves", "![Loss, and retrieval on the validation images](curves.png)"]
    held = f"`{license}`." if license else "Not stated by its author: ask before you use it."
    if metadata["base_model"]:
        held += f" It was fine-tuned from {PREFIX}{metadata['base_model']}, whose licence applies too."
    return "\n\n".join([*parts, "## Licence", held]) + "\n"


def rows(facts: dict[str, Any]) -> list[list[str]]:
    """Returns the rows of a table of facts by name; of a path, its last part, because others are of one machine."""
    return [[key, _shown(value)] for key, value in facts.items() if value is not None]


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return (Path(text).name if text.startswith(("/", "~", ".")) else text)[:MOST]


def _data(config: dict[str, Any], run: Path) -> list[str]:
    start = (read_starts(run) or [{}])[-1]
    table = [["", "training", "validation"]]
    training, validation = (config.get(section) or {} for section in ("data", "validation"))
    for key in dict.fromkeys([*training, *validation]):
        table.append([key, *(_shown(section.get(key, "")) for section in (training, validation))])
    table.append(["pairs", *(_shown(start.get(f"{part}_pairs", "")) for part in ("training", "validation"))])
    table.append(["fingerprint", *(_shown(start.get(key, "")) for key in ("data", "validation"))])
    return ["## Data", markdown(table)]


def _training(config: dict[str, Any], run: Path) -> list[str]:
    starts = read_starts(run)
    start: dict[str, Any] = starts[-1] if starts else {}
    facts: dict[str, Any] = {
        key: start.get(key) for key in ("batch_size", "world_size", "device", "trained_parameters")
    }
    facts["steps"] = max((row["step"] for row in read_metrics(run)), default=None)
    facts["starts"] = len(starts) or None
    facts["seed"] = (config.get("run") or {}).get("seed")
    facts |= {f"optimizer.{key}": value for key, value in (config.get("optimizer") or {}).items()}
    facts |= {f"loss.{key}": value for key, value in (config.get("loss") or {}).items()}
    facts |= start.get("versions") or {}
    return ["## Training", markdown([["", "value"], *rows(facts)])]


def _numbers(run: Path) -> list[str]:
    try:
        record = read_run(run)
    except ValueError:  # there was no validation yet
        return []
    table = [["metric", "value"]]
    for metric in METRICS:
        for value in values([record], metric).values():
            table.append([metric.label, _number(metric, value)])
    found = f"Of the validation at step {record.best_step:,}"
    return ["## Numbers", found + (", and of an evaluation." if record.evaluation else "."), markdown(table)]


def _number(metric: Metric, value: float) -> str:
    return f"{value * metric.factor:.4g}"


def curves(run: Path) -> bytes | None:
    """Returns the curves of a run as a PNG: losses, and R@1 of validations; None if its log has no curve."""
    log = read_metrics(run)
    training, validation = ([row for row in log if row.get("split") == split] for split in ("train", "validation"))
    plots = {
        "loss": [series(training, "loss", "training", "soft"), series(validation, "loss", "validation", "a")],
        "R@1, %": [
            series(validation, "image_to_text_r1", "image to text", "a", factor=100),
            series(validation, "text_to_image_r1", "text to image", "b", factor=100),
        ],
    }
    drawn = {title: [line for line in lines if len(line.steps) > 1] for title, lines in plots.items()}
    drawn = {title: lines for title, lines in drawn.items() if lines}
    if not drawn:
        return None
    image = Image.new("RGB", (WIDTH * len(drawn), HEIGHT), "white")
    for i, (title, lines) in enumerate(drawn.items()):
        _plot(ImageDraw.Draw(image), WIDTH * i, title, lines)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _plot(draw: ImageDraw.ImageDraw, left: int, title: str, lines: list[Series]) -> None:
    font = ImageFont.load_default(13)
    last = float(max(line.steps.max() for line in lines)) or 1.0
    low, high = min(float(line.values.min()) for line in lines), max(float(line.values.max()) for line in lines)
    high = high if high > low else low + 1

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + MARGIN + step / last * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (value - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    draw.text((left + MARGIN, 8), title, fill="black", font=font)
    for tick in ticks(low, high):
        (x, y), (end, _) = place(0, tick), place(last, tick)
        draw.line([(x, y), (end, y)], fill="#e5e7eb")
        draw.text((x - 6, y), tick_label(tick), fill="black", font=font, anchor="rm")
    for tick in ticks(0, last):
        x, y = place(tick, low)
        draw.text((x, y + 8), tick_label(tick), fill="black", font=font, anchor="ma")
    draw.text((left + WIDTH - MARGIN, HEIGHT - 22), "optimizer step", fill="black", font=font, anchor="ra")
    for i, line in enumerate(lines):
        points = [place(float(step), float(value)) for step, value in zip(line.steps, line.values, strict=True)]
        thinned = [points[j] for j in np.linspace(0, len(points) - 1, min(len(points), WIDTH)).astype(int)]
        draw.line(thinned, fill=COLORS[line.color], width=2)
        draw.text((left + MARGIN + 130 * i + 60, 8), line.label, fill=COLORS[line.color], font=font)
