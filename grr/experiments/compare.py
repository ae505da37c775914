"""Comparison of models by their runs: the metrics of the paper's table 2, with their spread over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from grr.experiments.runs import RunRecord, differences
from grr.experiments.statistics import Difference, Spread, difference, spread
from grr.training.log import is_number

DataSet = Literal["CC12M", "MSCOCO", "ROCOv2", "Flickr30k"]

# GRR-CoCa, table 2, validation sets: baseline, GRR, and the change as printed
PUBLISHED: dict[DataSet, dict[str, tuple[float, float, float]]] = {
    "CC12M": {"loss": (3.2864, 3.0516, -7.15), "perplexity": (12.9976, 12.5151, -3.71),
              "contrastive_loss": (0.3610, 0.2626, -27.25)},
    "MSCOCO": {"loss": (4.6955, 4.4090, -6.10), "perplexity": (5.4669, 5.1523, -5.75),
               "contrastive_loss": (1.2971, 1.1296, -12.92)},
    "ROCOv2": {"loss": (7.0609, 6.8708, -2.69), "perplexity": (12.0258, 11.7377, -2.40),
               "contrastive_loss": (2.0900, 1.9479, -6.80)},
    "Flickr30k": {"loss": (5.4383, 5.0111, -7.86), "perplexity": (7.9568, 7.3686, -7.39),
                  "contrastive_loss": (1.2908, 1.0164, -21.25)},
}  # fmt: skip


class Metric(NamedTuple):
    """Metric of a run: of its best validation, or of a task of its evaluation."""

    label: str
    key: str
    task: str | None = None
    lower_is_better: bool = False
    factor: float = 100  # shown values are multiplied by it


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
CLASSIFIERS = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "attentive_probe": "attentive probe"}
METRICS = [
    *(Metric(label, key, lower_is_better=True, factor=1) for key, label in LOSSES.items()),
    *(Metric(label, key) for key, label in RECALLS.items()),
    Metric("captions exact, %", "caption_exact"),
    Metric("accuracy, %", "accuracy"),
    *(Metric(f"evaluation: {label}", key, "losses", lower_is_better=True, factor=1) for key, label in LOSSES.items()),
    *(Metric(f"evaluation: {label}", key, "retrieval") for key, label in RECALLS.items()),
    *(Metric(f"evaluation: {label}", key, "captions", factor=1) for key, label in CAPTIONS.items()),
    Metric("evaluation: captions exact, %", "exact", "captions"),
    Metric("evaluation: spatial words right, %", "accuracy", "relations"),
    *(Metric(f"evaluation: {name} top {k}, %", f"top_{k}", task) for task, name in CLASSIFIERS.items() for k in (1, 5)),
]


class Line(NamedTuple):
    """Values of a metric for all models, and the difference of each from the first."""

    metric: Metric
    spreads: list[Spread | None]  # None: not measured
    differences: list[Difference | None]


class Comparison(NamedTuple):
    """Comparison of models, of which the first is the baseline."""

    models: Mapping[str, Sequence[RunRecord]]
    lines: list[Line]
    published: DataSet | None
    unequal: list[str]  # conditions, other than the model, in which the runs differ; show them beside the metrics


def compare(
    models: Mapping[str, Sequence[RunRecord]], *, published: DataSet | None = None, allow_differences: bool = False
) -> Comparison:
    """Compare the runs of models with those of the first: means, spreads over seeds, and paired differences.

    published: a data set whose metrics in the paper are shown as well. Raises ValueError if there are fewer than two
    models, or, without allow_differences, if runs differ in conditions other than the model or are not finished; the
    message lists all differences.
    """
    if len(models) < 2:
        raise ValueError(
            f"compare: there must be at least two models, got {', '.join(models) or 'none'}; add one to run.models"
        )
    unequal = differences(models)
    if unequal and not allow_differences:
        raise ValueError(
            "compare: the runs differ in more than their models, so their metrics do not compare these; train them "
            "under equal conditions, or set run.allow_differences=true to see the metrics below these lines:"
            + "".join(f"\n  {line}" for line in unequal)
        )
    lines = []
    for metric in METRICS:
        base, *others = (
            {run.seed: x for run in runs if is_number(x := _value(run, metric))} for runs in models.values()
        )
        if base or any(others):
            lines.append(
                Line(
                    metric,
                    [spread(list(values.values())) if values else None for values in (base, *others)],
                    [difference(values, base) if values and base else None for values in others],
                )
            )
    return Comparison(models, lines, published, unequal)


def _value(run: RunRecord, metric: Metric) -> Any:
    if metric.task is None:
        return run.best.get(metric.key)
    return run.evaluation.get("results", {}).get(metric.task, {}).get(metric.key)
