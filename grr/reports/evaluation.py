"""The outputs of an evaluation: evaluation.json, a page beside it, and the same numbers for a terminal."""

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grr
from grr.evaluation.captions import UNITS
from grr.evaluation.examples import Examples
from grr.parallel.device import default_device, device_name
from grr.reports.charts import number, percent
from grr.reports.page import header, section, write_page, write_whole
from grr.reports.samples import show_examples
from grr.reports.table import Table, aligned, html

Evaluation = dict[str, Any]

MOST = 60  # classes whose confusions are drawn
CELL = 14  # side of a drawn cell
NAMES = 90  # room for the names of classes
LISTED = 12  # confusions in words
KINDS = 30  # kinds of questions that have a row each
LOSSES = ("loss", "contrastive_loss", "captioning_loss", "perplexity")
CAPTION_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
DATA = ("data", "labelled", "labelled_train", "choices")
ACCURACIES = ("top_1", "top_5", "mean_per_class")
CLASSIFIERS = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "attentive_probe": "attentive probe"}


CHOICES = {
    f"{score}_{part}": f"{score}, {part}" for score in ("cosine", "likelihood") for part in ("text", "image", "group")
}


class Confusions(NamedTuple):
    """The confusion matrix: counts[i, j] images of class i have class j predicted."""

    classes: Sequence[str]
    counts: Tensor  # int64 [c, c]

    @classmethod
    def of(cls, classes: Sequence[str], scores: Tensor, labels: Tensor) -> "Confusions":
        """scores: [n, c], labels: [n]."""
        c = len(classes)
        return cls(classes, torch.bincount(labels * c + scores.argmax(1), minlength=c * c).view(c, c))


class Part(NamedTuple):
    """The results of one kind of task: a table and a note on its columns."""

    title: str
    table: Table
    note: str


def write_evaluation(
    folder: Path, evaluation: Evaluation, examples: Examples | None, confusions: Confusions | None
) -> Path:
    """Write folder/evaluation.json and folder/evaluation.html, each whole or not at all; return the path of the page.

    evaluation: JSON values, "model", "data" and "results" at least; "made" is added to them: when, with what versions,
    and on which device.
    """
    device = device_name(default_device())
    time = datetime.now(UTC).isoformat(timespec="seconds")
    made = {"time": time, "grr": grr.__version__, "torch": torch.__version__, "device": device}
    text = json.dumps(_finite({**evaluation, "made": made}), indent=2, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "evaluation.json", text + "\n")
    shown = "".join(map(_show_part, parts(evaluation["results"])))
    return write_page(
        folder / "evaluation.html",
        _title(evaluation),
        _header(evaluation),
        section("Results", "", f"<div class=results>{shown}</div>"),
        show_examples(examples) if examples else "",
        _show_confusions(confusions) if confusions else "",
        "<section class=files><h2>All numbers</h2><details><summary>evaluation.json</summary>"
        f"<pre>{escape(text)}</pre></details></section>",
    )


def as_text(evaluation: Evaluation) -> str:
    """The numbers of an evaluation for a terminal."""
    shown = [f"{part.title}: {part.note}\n{aligned(part.table)}" for part in parts(evaluation["results"])]
    lines = [f"{_title(evaluation)}: {_counts(evaluation)}", *_left_out(evaluation)]
    return "\n\n".join(["\n".join(lines), *shown]).replace("\u202f", " ")


def parts(results: dict[str, dict[str, Any]]) -> list[Part]:
    """The results of an evaluation, by kind of task."""
    result = []
    if loss := results.get("losses"):
        note = (
            f"loss = {loss['contrastive_weight']:g} × contrastive + {loss['captioning_weight']:g} × captioning, "
            f"contrastive batches of {loss['contrastive_batch']:,}"
        )
        table = [
            ["", "loss", "contrastive", "captioning", "perplexity"],
            ["mean", *(number(loss[key]) for key in LOSSES)],
        ]
        result.append(Part("Losses", table, note))
    if recall := results.get("retrieval"):
        ways = {"text_to_image": "text to image", "image_to_text": "image to text"}
        table = [["", "R@1", "R@5", "R@10"]]
        table += [[name, *(percent(recall[f"{way}_r{k}"]) for k in (1, 5, 10))] for way, name in ways.items()]
        result.append(Part("Retrieval", table, f"among {recall['num_eval_images']:,} images and their captions"))
    if scores := results.get("captions"):
        table = [
            ["", "B-1", "B-2", "B-3", "B-4", "ROUGE-L", "CIDEr-D", "exact"],
            ["mean", *(f"{scores[key]:.3f}" for key in CAPTION_METRICS), percent(scores["exact"])],
        ]
        result.append(Part("Captions", table, f"B: BLEU. {UNITS}. Exact: equal to a reference, to the letter"))
    if scores := results.get("meteor"):
        note = "from 0 to 1, by NLTK, whose values differ from those of METEOR 1.5 in published tables"
        result.append(Part("METEOR", [["", "METEOR"], ["mean", f"{scores['meteor']:.3f}"]], note))
    if judged := results.get("clip_score"):
        result.append(_clip_score(judged))
    if relations := results.get("relations"):
        table = [["", "right"], ["spatial words", percent(relations["accuracy"])]]
        note = f"captions that say as a reference where the objects are, of {relations['images']:,} images"
        result.append(Part("Relations", table, note))
    if known := {name: results[task] for task, name in CLASSIFIERS.items() if task in results}:
        table = [["", "top 1", "top 5", "mean of classes"]]
        for name, one in known.items():
            table.append([name, *(percent(one[key]) if key in one else "" for key in ACCURACIES)])
        note = "top 1 and top 5: how often the right class is the likeliest, or among the five likeliest"
        result.append(Part("Classes", table, note))
    if choices := results.get("choices"):
        result.append(_choices(choices))
    return result


def _clip_score(judged: dict[str, Any]) -> Part:
    table = [
        ["", "CLIPScore", "RefCLIPScore"],
        ["mean", f"{judged['clip_score']:.3f}", f"{judged['ref_clip_score']:.3f}"],
    ]
    itself = ", which is the evaluated model itself: that flatters it" if judged["judges_itself"] else ""
    note = f"2.5 × cosine, and its harmonic mean with that of the nearest reference, by {judged['judge']}{itself}"
    if judged["truncated"]:
        note += f"; {judged['truncated']:,} captions and references are longer than its context and were cut"
    return Part("CLIPScore", table, note)


def _choices(found: dict[str, Any]) -> Part:
    """The accuracies in questions about right and wrong captions; a row for each kind of question, if not too many."""
    names = [name for name in CHOICES if name in found]
    table = [["", "questions", *(CHOICES[name] for name in names)]]
    kinds = found["kinds"] if 1 < len(found["kinds"]) <= KINDS else {}
    for label, one in [*kinds.items(), ("all", found)]:
        table.append([label, f"{one['questions']:,}", *(percent(one[name]) for name in names)])
    left_out = f"; questions left out: {found['left_out']:,}, see evaluation.json" if found["left_out"] else ""
    note = "an image must score higher with its right caption than with a wrong one, by cosine and by likelihood"
    return Part("Choices", table, note + left_out)


# The parts of the page


def _title(evaluation: Evaluation) -> str:
    data = evaluation["data"] or evaluation["labelled"] or evaluation["choices"]
    split = f" ({data['split']})" if data.get("split") else ""
    return f"{evaluation['model']['builder']} on {data['name']}{split}"


def _counts(evaluation: Evaluation) -> str:
    data = evaluation["data"] or evaluation["labelled"] or evaluation["choices"]
    counts = f"{data['images']:,} images" + (f", {data['captions']:,} captions" if "captions" in data else "")
    if data.get("truncated"):
        counts += f", of which {data['truncated']:,} are cut to {data['max_tokens']} tokens"
    return counts + (f", {data['left_out']:,} left out" if data["left_out"] else "")


def _left_out(evaluation: Evaluation) -> list[str]:
    """Returns a line for each data set of which records, images or captions are missing, and where they are listed."""
    kinds = {"left_out": "left out", "skipped": "skipped by the reader"}
    counts = {(key, kind): (evaluation.get(key) or {}).get(kind, 0) for key in DATA for kind in kinds}
    return [
        f"{key}: {count:,} {kinds[kind]}; evaluation.json lists them with their causes as {key}.{kind}_names"
        for (key, kind), count in counts.items()
        if count
    ]


def _header(evaluation: Evaluation) -> str:
    model = evaluation["model"]
    return header(_title(evaluation), str(model["path"]), f"{model['parameters']:,} parameters", _counts(evaluation))


def _show_part(part: Part) -> str:
    note = part.note[0].upper() + part.note[1:]
    return f"<article><h3>{part.title}</h3>{html(part.table)}<p>{escape(note)}.</p></article>"


def _show_confusions(confusions: Confusions) -> str:
    """The confusion matrix, if there are at most 60 classes, and the most frequent confusions in words."""
    wrong = confusions.counts.clone().fill_diagonal_(0)
    most = wrong.flatten().argsort(descending=True, stable=True)[:LISTED]
    places = [divmod(k, len(wrong)) for k in most.tolist() if wrong.flatten()[k]]
    sentences = "".join(f"<li>{escape(_confusion(confusions, i, j))}</li>" for i, j in places)
    sentences = f"<ul class=notes>{sentences}</ul>" if sentences else "<p>Every prediction is right.</p>"
    drawn = _matrix(confusions) if len(wrong) <= MOST else ""
    note = "Zero-shot classification: a row is a class, a column a prediction."
    return section("Confusion matrix", note, drawn + sentences)


def _matrix(confusions: Confusions) -> str:
    classes, counts = confusions
    side = NAMES + CELL * len(classes)
    names = cells = ""
    for i, name in enumerate(map(escape, classes)):
        middle = NAMES + CELL * i + CELL / 2
        names += f"<text x={NAMES - 5} y={middle} dy=.35em>{name}</text>"
        above = f'transform="translate({middle} {NAMES - 5}) rotate(-90)" dy=.35em style="text-anchor:start"'
        names += f"<text {above}>{name}</text>"
    for i, j in counts.nonzero().tolist():
        share = counts[i, j] / counts[i].sum()
        style = f"fill:var(--{'right' if i == j else 'b'});opacity:{max(0.2, share):.2f}"
        place = f"x={NAMES + CELL * j + 1} y={NAMES + CELL * i + 1} width={CELL - 2} height={CELL - 2}"
        cells += f'<rect {place} style="{style}"><title>{escape(_confusion(confusions, i, j))}</title></rect>'
    return f'<div class=scroll><svg viewBox="0 0 {side} {side}" style="width:{side}px">{names}{cells}</svg></div>'


def _confusion(confusions: Confusions, i: int, j: int) -> str:
    classes, counts = confusions
    return f"{classes[i]} predicted as {classes[j]}: {counts[i, j]} of {counts[i].sum()}"


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
