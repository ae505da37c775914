"""Metrics of a run that a comparison shows: of its validation, and of its evaluation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from grr.config.spelling import did_you_mean
from grr.experiments.runs import RunRecord
from grr.training.log import is_number


class Metric(NamedTuple):
    """Metric of a run: of its best validation, or of a task of its evaluation."""

    label: str
    key: str
    task: str | None = None
    lower_is_better: bool = False
    factor: float = 100  # shown values are multiplied by it

    @property
    def name(self) -> str:
        return self.key if self.task is None else f"{self.task}.{self.key}"


LOSSES = {
    "loss": "CoCa loss",
    "perplexity": "perplexity",
    "captioning_loss": "captioning loss",
    "contrastive_loss": "contrastive loss",
}
WAYS = {"text_to_image": "text to image", "image_to_text": "image to text"}
RECALLS = {f"{way}_r{k}": f"R@{k} {name}, %" for way, name in WAYS.items() for k in (1, 5, 10)}
CAPTIONS = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr-D",
}
JUDGED = {"clip_score": "CLIPScore", "ref_clip_score": "RefCLIPScore"}
CLASSIFIERS = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "attentive_probe": "attentive probe"}
METRICS = [
    *(Metric(label, key, lower_is_better=True, factor=1) for key, label in LOSSES.items()),
    *(Metric(label, key) for key, label in RECALLS.items()),
    Metric("captions exact, %", "caption_exact"),
    Metric("accuracy, %", "accuracy"),
    Metric("VQA accuracy, %", "vqa_accuracy"),
    *(Metric(f"evaluation: {label}", key, "losses", lower_is_better=True, factor=1) for key, label in LOSSES.items()),
    *(Metric(f"evaluation: {label}", key, "retrieval") for key, label in RECALLS.items()),
    *(Metric(f"evaluation: {label}", key, "captions", factor=1) for key, label in CAPTIONS.items()),
    Metric("evaluation: captions exact, %", "exact", "captions"),
    Metric("evaluation: METEOR of NLTK", "meteor", "meteor", factor=1),
    *(Metric(f"evaluation: {label}", key, "clip_score", factor=1) for key, label in JUDGED.items()),
    Metric("evaluation: spatial words right, %", "accuracy", "relations"),
    *(
        Metric(f"evaluation: choices by {score}, {part}, %", f"{score}_{part}", "choices")
        for score in ("cosine", "likelihood")
        for part in ("text", "image", "group")
    ),
    *(Metric(f"evaluation: {name} top {k}, %", f"top_{k}", task) for task, name in CLASSIFIERS.items() for k in (1, 5)),
]


def metric(name: str) -> Metric:
    """Returns the metric of a name: that of its key in the log, "captioning_loss", or of its task and key in the
    evaluation, "losses.contrastive_loss". Raises ValueError if there is none."""
    known = {metric.name: metric for metric in METRICS}
    if name not in known:
        raise ValueError(
            f"compare: a metric must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
        )
    return known[name]


def values(runs: Sequence[RunRecord], metric: Metric) -> dict[int, float]:
    """Returns the values of a metric by the seeds of the runs that have it."""
    return {run.seed: float(x) for run in runs if is_number(x := _value(run, metric))}


def _value(run: RunRecord, metric: Metric) -> Any:
    if metric.task is None:
        return run.best.get(metric.key)
    return run.evaluation.get("results", {}).get(metric.task, {}).get(metric.key)
