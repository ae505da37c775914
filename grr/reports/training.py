"""The report of a run: one self-contained page of its numbers, its curves and its examples."""

import math
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from grr.evaluation.examples import Examples
from grr.reports.charts import Level, Series, chart, number, percent, series
from grr.reports.history import record_captions, show_history
from grr.reports.page import header, section, write_page
from grr.reports.samples import show_examples
from grr.training.log import LogLine, is_number, kept_step, read_metrics


def write_report(folder: Path, *, title: str, examples: Examples | None) -> Path:
    """Write folder/report.html from the metrics.jsonl, config.yaml and manifest.json that are there; return its path.

    examples: those of the last validation in the log; their captions are added to folder/examples.jsonl, from which
    the page shows how captions changed. Curves are thinned to 300 points, which keep extremes and ends.
    """
    rows = read_metrics(folder)
    validations = [row for row in rows if row.get("split") in ("validation", "final")]
    if examples:
        record_captions(folder, validations, examples)
    parts = [
        _header(title, rows, _last_step(folder, rows)),
        _key_numbers(validations),
        _curves(rows, softmax=_options(folder, "loss").get("contrastive") != "sigmoid"),
        show_examples(examples) if examples else "",
        show_history(folder, validations, examples.captions) if examples else "",
        _files(folder),
    ]
    return write_page(folder / "report.html", title, *parts)


# The parts of the page


def _header(title: str, rows: list[LogLine], last: int | None) -> str:
    facts = []
    bar = ""
    if rows:
        step, epoch = rows[-1]["step"], rows[-1].get("epoch")
        facts.append(f"step {step:,} of {last:,}" if last else f"step {step:,}")
        if epoch is not None:
            facts.append(f"epoch {epoch:.1f}")
        if last:
            bar = f'<progress value="{step}" max="{last}" aria-label="progress">{step / last:.0%}</progress>'
    empty = "" if rows else "<p>There are no numbers yet.</p>"
    return header(title, *facts, below=bar + empty)


def _last_step(folder: Path, rows: list[LogLine]) -> int | None:
    """The last step of the run by its config and its log; None if they do not say."""
    epochs, max_steps = (_options(folder, "run").get(key) for key in ("epochs", "max_steps"))
    ends = [max_steps] if isinstance(max_steps, int) else []
    if isinstance(epochs, int) and rows and rows[-1].get("epoch"):
        ends.append(round(epochs * rows[-1]["step"] / rows[-1]["epoch"]))
    return min(ends, default=None)


def _options(folder: Path, section: str) -> dict[str, Any]:
    """A section of the run's config; empty if the file is missing or damaged, which must not end a training run."""
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
        return dict(config[section])
    except Exception:
        return {}


def _key_numbers(validations: list[LogLine]) -> str:
    """The numbers of the last validation, each with its chance level or the number of the validation before.

    The line "final", of the model that the run saves, is compared with the first validation, unless that is of the
    same step.
    """
    if not validations:
        return ""
    now, final = validations[-1], validations[-1].get("split") == "final"
    before = validations[0 if final else -2] if len(validations) > 1 else None
    if before is not None and before["step"] == (kept_step(now) if final else now["step"]):
        before = None
    was = partial(_was, before, "first validation" if before is validations[0] else "validation before")
    num_eval_images = now.get("num_eval_images")
    chance = f"chance {percent(1 / num_eval_images)}" if num_eval_images else ""
    tiles = []
    for key, label in (
        ("text_to_image", "Text to image"),
        ("image_to_text", "Image to text"),
    ):
        if is_number(now.get(f"{key}_r1")):
            deeper = [f"R@{k} {percent(now[f'{key}_r{k}'])}" for k in (5, 10) if is_number(now.get(f"{key}_r{k}"))]
            tiles.append((f"{label}, R@1", percent(now[f"{key}_r1"]), [chance, *deeper]))
    if is_number(now.get("accuracy")):
        guessed = (
            f"{percent(now['text_only_accuracy'])} from the texts alone"
            if is_number(now.get("text_only_accuracy"))
            else ""
        )
        tiles.append(("Accuracy", percent(now["accuracy"]), [guessed, *was("accuracy")]))
    if is_number(now.get("vqa_accuracy")):
        tiles.append(("VQA accuracy", percent(now["vqa_accuracy"]), was("vqa_accuracy")))
    if is_number(now.get("caption_exact")):
        tiles.append(("Captions equal to a reference", percent(now["caption_exact"]), was("caption_exact")))
    for key, label in (("perplexity", "Perplexity"), ("contrastive_loss", "Contrastive loss"), ("loss", "Loss")):
        if is_number(now.get(key)):
            tiles.append((label, number(now[key]), was(key)))
    if not tiles:
        return ""
    items = "".join(
        f"<div><dt>{label}</dt><dd><b>{value}</b>{''.join(f'<small>{n}</small>' for n in notes if n)}</dd></div>"
        for label, value, notes in tiles
    )
    among = f", retrieval among {num_eval_images:,} images" if num_eval_images else ""
    when = f"The model in model/, of step {kept_step(now):,}" if final else f"Step {now['step']:,}"
    overfits = _overfitting(validations)
    return section("Validation", f"{when}{among}.{overfits}", f"<dl>{items}</dl>")


def _overfitting(validations: list[LogLine]) -> str:
    """A sentence about the lowest validation loss, if that is not the last one."""
    losses = [
        (row["loss"], row["step"])
        for row in validations
        if row.get("split") == "validation" and is_number(row.get("loss"))
    ]
    if not losses or min(losses)[1] == losses[-1][1]:
        return ""
    low, step = min(losses)
    return (
        f" The lowest validation loss, {number(low)}, was at step {step:,}; it was {number(losses[-1][0])} at step "
        f"{losses[-1][1]:,}: the run overfits after step {step:,}."
    )


def _was(before: LogLine | None, which: str, key: str) -> list[str]:
    """A note with the number of an earlier validation, which has a name."""
    if before is None or not is_number(before.get(key)):
        return []
    value = percent(before[key]) if key in ("accuracy", "vqa_accuracy", "caption_exact") else number(before[key])
    return [f"{which}, step {before['step']:,}: {value}"]


def _loss_title(row: LogLine) -> str:
    """The name of the loss with its weights, without which two losses cannot be compared."""
    if not is_number(row.get("contrastive_weight")):
        return "Loss"
    return f"Loss = {row['contrastive_weight']:g} × contrastive + {row['captioning_weight']:g} × captioning"


def _chances(train: list[LogLine], held_out: list[LogLine]) -> list[Level]:
    """The contrastive loss of a uniform guess, 2 ln N over both directions, at the batch size N of each curve."""
    levels: dict[int, Level] = {}
    for rows, color in ((train, "a"), (held_out, "b")):
        for n in [row["contrastive_batch"] for row in rows[-1:] if row.get("contrastive_batch")]:
            levels.setdefault(n, Level(f"chance among {n:,} pairs, 2 ln {n:,}", 2 * math.log(n), color))
    return list(levels.values())


def _curves(rows: list[LogLine], *, softmax: bool) -> str:
    train, held_out = ([row for row in rows if row.get("split") == split] for split in ("train", "validation"))

    def both(key: str, factor: float = 1) -> list[Series]:
        return [
            series(train, key, "train", "a", factor=factor, style="noisy"),
            series(held_out, key, "validation", "b", factor=factor),
        ]

    def alone(key: str, style: Literal["plain", "noisy"] = "plain") -> list[Series]:
        return [series(train, key, "train", "a", style=style)]

    recalls = [
        series(held_out, "text_to_image_r1", "text to image", "c", factor=100),
        series(held_out, "image_to_text_r1", "image to text", "d", factor=100),
    ]
    last = held_out[-1] if held_out else {}
    images, text_only = last.get("num_eval_images"), last.get("text_only_accuracy")
    kept = kept_step(rows[-1]) if rows and rows[-1].get("split") == "final" else None
    kept = kept if kept is not None else next((kept_step(row) for row in reversed(held_out)), None)
    validated: dict[str, Any] = {"wide": True, "best_step": kept}
    in_percent: dict[str, Any] = {"unit": "%", "low": 0, "high": 100}
    chance = [Level(f"chance among {images:,} images", 100 / images)] if images else []
    text_level = [Level("from the texts alone", 100 * last["text_only_accuracy"])] if is_number(text_only) else []
    charts = [
        chart(_loss_title((train + held_out or [{}])[-1]), both("loss"), unit="nats", **validated),
        chart("R@1", recalls, levels=chance, **in_percent, **validated),
        chart("Accuracy", both("accuracy", 100), levels=text_level, **in_percent, **validated),
        chart("VQA accuracy", both("vqa_accuracy", 100), **in_percent, **validated),
        chart(
            "Contrastive loss",
            both("contrastive_loss"),
            unit="nats",
            levels=_chances(train, held_out) if softmax else [],
            **validated,
        ),
        chart("Perplexity", both("perplexity"), unit="logarithmic", log=True, **validated),
        chart("Learning rate", alone("lr"), unit="", low=0),
        chart("Gradient norm", alone("grad_norm", "noisy"), unit="logarithmic", log=True),
        chart("Throughput", alone("samples_per_second", "noisy"), unit="samples per second", low=0),
    ]
    note = (
        "A faint point is one line of the training log, the line through these points their running mean. The vertical "
        "line is at the step of the weights that the run keeps."
    )
    return section("Curves", note, f"<div class=charts>{''.join(charts)}</div>" if any(charts) else "")


def _files(folder: Path) -> str:
    items = ""
    for file in (folder / "config.yaml", folder / "manifest.json"):
        if file.is_file():
            text = escape(file.read_text("utf-8", errors="replace"))
            items += f"<details><summary>{file.name}</summary><pre>{text}</pre></details>"
    return f"<section class=files><h2>Configuration</h2>{items}</section>" if items else ""
