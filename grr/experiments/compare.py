"""Comparison of models by their runs: the metrics of the paper's table 2, with their spread over seeds."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from grr.config.spelling import did_you_mean
from grr.experiments.curves import steps_to_end_of
from grr.experiments.factorial import Effect, effects
from grr.experiments.metrics import METRICS, Metric, metric, values
from grr.experiments.runs import RunRecord, differences
from grr.experiments.statistics import Difference, Spread, difference, holm, spread

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


class Line(NamedTuple):
    """Values of a metric for all models, and the difference of each from the first."""

    metric: Metric
    spreads: list[Spread | None]  # None: not measured
    differences: list[Difference | None]


class Endpoint(NamedTuple):
    """Difference of a model from the first in a metric that was chosen before the runs."""

    model: str
    metric: Metric
    primary: bool
    difference: Difference | None  # None: one of the models does not have the metric
    holm_p: float | None  # p of the t-test, corrected for the number of secondary metrics; None for the primary one


class Comparison(NamedTuple):
    """Comparison of models, of which the first is the baseline."""

    models: Mapping[str, Sequence[RunRecord]]
    lines: list[Line]
    published: DataSet | None
    unequal: list[str]  # conditions, other than the model, in which the runs differ; show them beside the metrics
    endpoints: list[Endpoint]  # of each model but the first, if a primary metric was chosen
    factorial: list[tuple[Metric, list[Effect]]]  # if the models are all combinations of some changes
    reached: dict[str, list[float | None]]  # model -> for each seed the step where it is at the first model's end


def compare(
    models: Mapping[str, Sequence[RunRecord]],
    *,
    published: DataSet | None = None,
    primary: str | None = None,
    secondary: Sequence[str] = (),
    differ: Sequence[str] = (),
    allow_differences: bool = False,
) -> Comparison:
    """Compare the runs of models with those of the first: means, spreads over seeds, and paired differences.

    published: a data set whose metrics in the paper are shown as well. primary, secondary: names of metrics
    (`grr.experiments.metrics.metric`) that are tested; the p values of secondary ones are corrected for their number.
    differ: conditions that belong to a model, such as optimizer.lr where it was chosen for each.
    Raises ValueError if there are fewer than two models, if a metric or a condition does not exist or is named twice,
    or, without allow_differences, if runs differ in conditions other than the model or are not finished; the message
    lists all differences.
    """
    if len(models) < 2:
        raise ValueError(
            f"compare: there must be at least two models, got {', '.join(models) or 'none'}; add one to run.models"
        )
    if secondary and primary is None:
        raise ValueError(f"compare: secondary metrics need a primary one, got {', '.join(secondary)}; set run.primary")
    names = ([primary] if primary else []) + list(secondary)
    if len(set(names)) < len(names):
        raise ValueError(f"compare: a metric must be an endpoint once, got {', '.join(names)}; remove the repeated one")
    known = {key for runs in models.values() for run in runs for key in run.conditions}
    if unknown := [key for key in differ if key not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"compare: differ must name conditions of the runs, got {', '.join(unknown)}{hint}")
    tested = [metric(name) for name in names]
    unequal = differences(models, differ)
    if unequal and not allow_differences:
        raise ValueError(
            "compare: the runs differ in more than their models, so their metrics do not compare these; train them "
            "under equal conditions, or set run.allow_differences=true to see the metrics below these lines:"
            + "".join(f"\n  {line}" for line in unequal)
        )
    lines = [line for one in METRICS if (line := _line(models, one))]
    first, *others = models.items()
    return Comparison(
        models,
        lines,
        published,
        unequal,
        [endpoint for name, _ in others for endpoint in _endpoints(models, name, tested)],
        [(one, found) for one in tested if (found := effects(models, [values(runs, one) for runs in models.values()]))],
        {name: steps_to_end_of(runs, first[1], tested[0].key) for name, runs in others if tested and _falls(tested[0])},
    )


def _falls(one: Metric) -> bool:
    """Returns whether a metric is in the validations of the log, and smaller values are better."""
    return one.task is None and one.lower_is_better


def _line(models: Mapping[str, Sequence[RunRecord]], one: Metric) -> Line | None:
    """Returns the values of a metric, None if no run has it."""
    base, *others = (values(runs, one) for runs in models.values())
    if not base and not any(others):
        return None
    return Line(
        one,
        [spread(list(of_model.values())) if of_model else None for of_model in (base, *others)],
        [difference(of_model, base) if of_model and base else None for of_model in others],
    )


def _endpoints(models: Mapping[str, Sequence[RunRecord]], name: str, tested: Sequence[Metric]) -> list[Endpoint]:
    """Returns the tests of a model against the first: of the primary metric, which is the first of `tested`, and of
    the others."""
    base = next(iter(models.values()))
    found: list[Difference | None] = []
    for one in tested:
        of_model, of_base = values(models[name], one), values(base, one)
        found.append(difference(of_model, of_base) if of_model and of_base else None)
    known = [d for d in found[1:] if d is not None and d.p is not None]
    corrected = iter(holm([d.p for d in known if d.p is not None]))
    ps = [next(corrected) if i and d in known else None for i, d in enumerate(found)]
    return [Endpoint(name, one, i == 0, d, ps[i]) for i, (one, d) in enumerate(zip(tested, found, strict=True))]
