"""Tables of an experiment: tests of its endpoints, effects of a factorial design, and steps to the baseline's end."""

from statistics import fmean, stdev
from typing import NamedTuple

from grr.experiments.compare import Comparison
from grr.experiments.factorial import Effect
from grr.experiments.metrics import Metric
from grr.experiments.statistics import Difference
from grr.reports.table import Table


class Titled(NamedTuple):
    """A table and its title."""

    title: str
    table: Table


def experiment_tables(comparison: Comparison) -> list[Titled]:
    """Returns the tables of a comparison with a primary metric, none without."""
    if not comparison.endpoints:
        return []
    first, primary = next(iter(comparison.models)), comparison.endpoints[0].metric
    tables = [Titled(f"Tests against {first} (95 % intervals of Student's t; p)", endpoint_table(comparison))]
    if comparison.factorial:
        title = "Effects of the changes, each averaged over the others, and their interactions (95 % intervals)"
        tables.append(Titled(title, factorial_table(comparison)))
    if any(comparison.reached.values()):
        tables.append(Titled(f"Step at which {primary.label} is where that of {first} ends", reached_table(comparison)))
    return tables


def endpoint_table(comparison: Comparison) -> Table:
    """A row for each tested metric of each model: its difference from the first model and the tests."""
    rows = [["", "difference", "95 % interval", "t-test", "sign flips", "Holm"]]
    for endpoint in comparison.endpoints:
        kind = "primary" if endpoint.primary else "secondary"
        of_model = f"{endpoint.model}: " if len(comparison.models) > 2 else ""
        label = f"{of_model}{endpoint.metric.label} ({kind})"
        difference, metric = endpoint.difference, endpoint.metric
        if difference is None or difference.interval is None:
            rows.append([label, "–", "–", "–", "–", "–"])
            continue
        cells = [_signed(difference.mean, metric), _interval(difference, metric)]
        ps = (difference.p, difference.sign_flip_p, endpoint.holm_p)
        rows.append([label, *cells, *map(_p, ps)])
    return rows


def factorial_table(comparison: Comparison) -> Table:
    """A row for each change and each interaction, a column for each tested metric."""
    metrics = [metric for metric, _ in comparison.factorial]
    rows = [["", *(metric.label for metric in metrics)]]
    for effects in zip(*(effects for _, effects in comparison.factorial), strict=True):
        cells = [_effect(effect, metric) for effect, metric in zip(effects, metrics, strict=True)]
        rows.append([_name(effects[0]), *cells])
    return rows


def reached_table(comparison: Comparison) -> Table:
    """A row for each model but the first: the mean step over the seeds, and how many of them reach that level."""
    rows = [["", "step", "seeds that reach it", "steps of a run"]]
    for name, steps in comparison.reached.items():
        known = [step for step in steps if step is not None]
        last = max(run.validations[-1]["step"] for run in comparison.models[name])
        mean = f"{fmean(known):,.0f}" if known else "–"
        mean += f" ± {stdev(known):,.0f}" if len(known) > 1 else ""
        rows.append([name, mean, f"{len(known)} of {len(steps)}", f"{last:,}"])
    return rows


def _name(effect: Effect) -> str:
    if len(effect.factors) == 1:
        [factor] = effect.factors
        return f"{factor.changed} instead of {factor.baseline}"
    return " × ".join(str(factor.changed) for factor in effect.factors)


def _effect(effect: Effect, metric: Metric) -> str:
    mark = " *" if effect.difference.beyond_spread else ""
    return f"{_signed(effect.difference.mean, metric)} {_interval(effect.difference, metric)}{mark}"


def _interval(difference: Difference, metric: Metric) -> str:
    if difference.interval is None:
        return "–"
    low, high = difference.interval
    return f"[{_signed(low, metric)}, {_signed(high, metric)}]"


def _signed(value: float, metric: Metric) -> str:
    return f"{value * metric.factor:+.{4 if metric.factor == 1 else 2}f}".replace("-", "−")


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
