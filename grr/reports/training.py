"""The report of a run: one page of curves, retrieved images and written captions, that needs nothing but itself."""

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from grr.evaluation.examples import Answer, Caption, Examples, Retrieval
from grr.reports.charts import Level, Series, chart, number, percent, series
from grr.reports.page import header, write_page
from grr.training.log import LogLine, is_number, kept_step, read_metrics

SIDE = 224  # pixels of a shown image, at most


def write_report(folder: Path, *, title: str, examples: Examples | None) -> Path:
    """Write folder/report.html from the metrics.jsonl, config.yaml and manifest.json that are there; returns its path.

    The page holds its images. Curves are thinned to 300 points, keeping extremes and ends.
    """
    rows = read_metrics(folder)
    parts = [
        _header(title, rows, _last_step(folder, rows)),
        _key_numbers([row for row in rows if row.get("split") in ("validation", "final")]),
        _curves(rows, softmax=_options(folder, "loss").get("contrastive") != "sigmoid"),
        show_retrievals(examples.retrievals) if examples else "",
        show_captions(examples.captions) if examples else "",
        show_answers(examples.answers) if examples else "",
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
    empty = "" if rows else "<p>The run has begun; there are no numbers yet.</p>"
    return header(title, *facts, below=bar + empty)


def _last_step(folder: Path, rows: list[LogLine]) -> int | None:
    """The step at which the run will end, if its config and its numbers tell."""
    epochs, max_steps = (_options(folder, "run").get(key) for key in ("epochs", "max_steps"))
    ends = [max_steps] if isinstance(max_steps, int) else []
    if isinstance(epochs, int) and rows and rows[-1].get("epoch"):
        ends.append(round(epochs * rows[-1]["step"] / rows[-1]["epoch"]))
    return min(ends, default=None)


def _options(folder: Path, section: str) -> dict[str, Any]:
    """A section of the run's config; empty where the file is missing or damaged, which may not end a training run."""
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
        return dict(config[section])
    except Exception:
        return {}


def _key_numbers(validations: list[LogLine]) -> str:
    """The last validation in large figures, each beside what it means or what it was before.

    The model that a run leaves has a line of its own at the end, "final": it is shown beside the first validation.
    """
    if not validations:
        return ""
    now, final = validations[-1], validations[-1].get("split") == "final"
    before = validations[0 if final else -2] if len(validations) > 1 else None
    num_eval_images = now.get("num_eval_images")
    chance = f"chance {percent(1 / num_eval_images)}" if num_eval_images else ""
    tiles = []
    for key, label in (
        ("text_to_image", "Sentences that find their image"),
        ("image_to_text", "Images that find a sentence of theirs"),
    ):
        if is_number(now.get(f"{key}_r1")):
            deeper = [f"R@{k} {percent(now[f'{key}_r{k}'])}" for k in (5, 10) if is_number(now.get(f"{key}_r{k}"))]
            tiles.append((label + ", R@1", percent(now[f"{key}_r1"]), [chance, *deeper]))
    if is_number(now.get("accuracy")):
        guessed = (
            f"{percent(now['text_only_accuracy'])} without the images"
            if is_number(now.get("text_only_accuracy"))
            else ""
        )
        tiles.append(("Right answers", percent(now["accuracy"]), [guessed, *_was(before, "accuracy")]))
    if is_number(now.get("caption_exact")):
        tiles.append(("Captions right to the letter", percent(now["caption_exact"]), _was(before, "caption_exact")))
    for key, label in (("perplexity", "Perplexity"), ("contrastive_loss", "Contrastive loss"), ("loss", "Loss")):
        if is_number(now.get(key)):
            tiles.append((label, number(now[key]), _was(before, key)))
    if not tiles:
        return ""
    items = "".join(
        f"<div><dt>{label}</dt><dd><b>{value}</b>{''.join(f'<small>{n}</small>' for n in notes if n)}</dd></div>"
        for label, value, notes in tiles
    )
    among = f", among {num_eval_images:,} candidates" if num_eval_images else ""
    when = f"The model in model/, of step {kept_step(now):,}" if final else f"Validation at step {now['step']:,}"
    overfits = _overfitting(validations)
    return f"<section><h2>What it can do</h2><p>{when}{among}.{overfits}</p><dl>{items}</dl></section>"


def _overfitting(validations: list[LogLine]) -> str:
    """From which step on the validation loss only rose, as a sentence; nothing while the last is the lowest."""
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
        f"{losses[-1][1]:,}: from step {step:,} on the run overfits."
    )


def _was(before: LogLine | None, key: str) -> list[str]:
    if before is None or not is_number(before.get(key)):
        return []
    value = percent(before[key]) if key in ("accuracy", "caption_exact") else number(before[key])
    return [f"{value} at step {before['step']:,}"]


def _loss_title(row: LogLine) -> str:
    """What a line of the log says of its loss: losses of different weights cannot be compared."""
    if not is_number(row.get("contrastive_weight")):
        return "Loss"
    return f"Loss = {row['contrastive_weight']:g} × contrastive + {row['captioning_weight']:g} × captioning"


def _chances(train: list[LogLine], held_out: list[LogLine]) -> list[Level]:
    """The contrastive loss of guessing among as many pairs as each curve contrasts: 2 ln N, for two directions."""
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
        series(held_out, "text_to_image_r1", "sentence to image", "c", factor=100),
        series(held_out, "image_to_text_r1", "image to sentence", "d", factor=100),
    ]
    kept = kept_step(rows[-1]) if rows and rows[-1].get("split") == "final" else None
    kept = kept if kept is not None else next((kept_step(row) for row in reversed(held_out)), None)
    chances = _chances(train, held_out) if softmax else []
    charts = [
        chart(_loss_title((train + held_out or [{}])[-1]), both("loss"), wide=True, best_step=kept),
        chart("R@1 in %", recalls, wide=True, low=0, high=100),
        chart("Right answers in %", both("accuracy", 100), wide=True, low=0, high=100),
        chart("Contrastive loss", both("contrastive_loss"), wide=True, levels=chances, best_step=kept),
        chart("Perplexity", both("perplexity"), wide=True, log=True, best_step=kept),
        chart("Learning rate", alone("lr"), low=0),
        chart("Gradient norm", alone("grad_norm", "noisy"), log=True),
        chart("Samples a second", alone("samples_per_second", "noisy"), low=0),
    ]
    if not any(charts):
        return ""
    return (
        "<section><h2>How it learned</h2><p>Over optimizer steps. A faint point is one line of the training log; "
        "the line through them is their running mean; a vertical line marks the weights that are kept. Perplexity "
        "and gradient norm have logarithmic axes.</p>"
        f"<div class=charts>{''.join(charts)}</div></section>"
    )


def show_retrievals(retrievals: list[Retrieval]) -> str:
    """The section of sentences and the images they find, as HTML; nothing if there are none."""
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
            found.append(f"<li{' class=right' if right else ''}>{picture(image, alt)}<span>{mark}</span></li>")
        missed = f"<p>The right image is not among these {len(found)}.</p>" if one.correct is None else ""
        items.append(
            f"<article><blockquote>{escape(one.query)}</blockquote><ol>{''.join(found)}</ol>{missed}</article>"
        )
    return (
        "<section><h2>A sentence of the validation data, and the images it finds</h2>"
        "<p>Nearest first, with the cosine "
        f"similarity; the right image is outlined.</p><div class=retrievals>{''.join(items)}</div></section>"
    )


def show_captions(captions: list[Caption]) -> str:
    """The section of images and the captions written for them, as HTML; nothing if there are none."""
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
        items.append(
            f"<figure>{picture(one.image, first)}<figcaption>{written}<p class=true>{escape(first)}</p>{more}"
            "</figcaption></figure>"
        )
    return (
        "<section><h2>An image, and the caption it writes</h2><p>Below each image what the model wrote, then, "
        "smaller, its reference caption; ✓ where the two are equal.</p>"
        f"<div class=captions>{''.join(items)}</div></section>"
    )


def show_answers(answers: list[Answer]) -> str:
    """The section of images and the classes they were given, as HTML; nothing if there are none."""
    if not answers:
        return ""
    items = []
    for one in answers:
        right = "none of the classes" if one.right is None else one.right
        check = ' <b class=check title="right">✓</b>' if one.given == one.right else ""
        items.append(
            f"<figure>{picture(one.image, f'{one.text}: {right}')}<figcaption>"
            f"<p class=true>{escape(one.text)}</p><p class=written>{escape(one.given)}{check}</p>"
            f"{'' if check else f'<p class=true>{escape(right)}</p>'}</figcaption></figure>"
        )
    return (
        "<section><h2>An image of the validation data, and its answer</h2>"
        "<p>Below each image what was asked or said of it, "
        "then the answer of the model, ✓ where it is right, and else, smaller, the right one.</p>"
        f"<div class=captions>{''.join(items)}</div></section>"
    )


def _words(caption: str) -> str:
    return " ".join(caption.split())


def _files(folder: Path) -> str:
    items = ""
    for file in (folder / "config.yaml", folder / "manifest.json"):
        if file.is_file():
            text = escape(file.read_text("utf-8", errors="replace"))
            items += f"<details><summary>{file.name}</summary><pre>{text}</pre></details>"
    return f"<section class=files><h2>What was run</h2>{items}</section>" if items else ""


def picture(image: Tensor, alt: str) -> str:
    """uint8 [3, h, w] -> an <img> that carries its own JPEG, reduced to at most 224 pixels a side."""
    small = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width={small.width} height={small.height} alt="{escape(alt)}">'
