"""A comparison of runs for a terminal, for a Markdown file, and as a page with the validation curves."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from grr.evaluation.flops import flops_are_known, forward_flops
from grr.experiments.compare import PUBLISHED, Comparison
from grr.experiments.metrics import Metric, values
from grr.experiments.runs import RunRecord
from grr.experiments.statistics import Difference, Spread
from grr.files.atomic import write_atomic
from grr.models.builders import MODELS
from grr.reports.charts import COLORS, Level, Series, chart, series
from grr.reports.endpoints import experiment_tables
from grr.reports.figures import curves_figure, differences_figure
from grr.reports.page import header, section, write_page
from grr.reports.table import Table, aligned, html, markdown
from grr.training.log import is_number

MANY = 4  # models from which on a table has a row for each instead of a column


def as_text(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    return _written(comparison, aligned, "  ")


def as_markdown(comparison: Comparison) -> str:
    """The comparison for a Markdown file."""
    return _written(comparison, markdown, "- ")


def as_csv(comparison: Comparison) -> str:
    """The values of all metrics, a row for each run, in full precision, for other programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metrics = [line.metric for line in comparison.lines]
    writer.writerow(["model", "seed", "step", *(metric.name for metric in metrics)])
    for name, runs in comparison.models.items():
        for run in runs:
            found = [values([run], metric).get(run.seed, "") for metric in metrics]
            writer.writerow([name, run.seed, run.best_step, *found])
    return text.getvalue()


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write folder/comparison.md, .csv, .html and, with a primary metric, its figures; return the path of the page.

    comparison_curves.svg has the validation curves of the primary metric, comparison_differences.svg its tests.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "comparison.md", as_markdown(comparison))
    write_atomic(folder / "comparison.csv", as_csv(comparison))
    for name, figure in figures(comparison).items():
        write_atomic(folder / name, figure)
    title = " · ".join(comparison.models)
    return write_page(
        folder / "comparison.html",
        title,
        _header(title, comparison),
        _numbers(comparison),
        _endpoints(comparison),
        _curves(comparison.models),
        _what_was_run(comparison),
    )


def figures(comparison: Comparison) -> dict[str, str]:
    """Returns the figures of a comparison with a primary metric, by the names of their files."""
    if not comparison.endpoints:
        return {}
    primary = comparison.endpoints[0].metric
    drawn = {"comparison_curves.svg": curves_figure(comparison, primary)}
    drawn["comparison_differences.svg"] = differences_figure(comparison)
    return {name: figure for name, figure in drawn.items() if figure}


# The tables


def result_table(comparison: Comparison) -> Table:
    """The paper's table 2: a metric a row, and for each model its value, its change, and its difference.

    From four models on, rows and columns are exchanged.
    """
    names = [f"{name} (n = {len(runs)})" for name, runs in comparison.models.items()]
    header = ["", names[0]]
    for name in names[1:]:
        header += [name, "change", "difference"]
    paper = PUBLISHED[comparison.published] if comparison.published else {}
    if comparison.published:
        header += [f"{comparison.published}, paper: baseline", "GRR", "change"]
    rows = [header, *_size_rows(comparison.models)]
    for line in comparison.lines:
        base, *others = line.spreads
        row = [line.metric.label + (" ↓" if line.metric.lower_is_better else " ↑"), _spread(base, line.metric)]
        for other, difference in zip(others, line.differences, strict=True):
            change = (other.mean - base.mean) / base.mean if base and other and _is_shown(base, line.metric) else None
            row += [_spread(other, line.metric), _change(change), _difference(difference, line.metric)]
        rows.append(row + (_printed(paper.get(line.metric.key)) if paper and line.metric.task is None else []))
    table = [row + [""] * (len(header) - len(row)) for row in rows]
    return table if len(names) < MANY else list(zip(*table, strict=True))


def run_table(models: Mapping[str, Sequence[RunRecord]]) -> Table:
    """A row for each run: its folder, the validation that its numbers are from, and the device."""
    header = ["model", "seed", "folder", "at step", "of", "CoCa loss", "commit", "device"]
    return [
        header,
        *(
            [
                name,
                str(run.seed),
                str(run.folder),
                f"{run.best_step:,}",
                f"{run.validations[-1]['step']:,}",
                f"{run.best['loss']:.4f}",
                str(run.start.get("commit")),
                str(run.start.get("device")),
            ]
            for name, runs in models.items()
            for run in runs
        ),
    ]


def model_table(models: Mapping[str, Sequence[RunRecord]]) -> Table:
    """The arguments of the builder in which the models differ."""
    firsts = {name: runs[0].model for name, runs in models.items()}
    keys = list(dict.fromkeys(key for model in firsts.values() for key in model))
    arguments = [[key, *(str(model.get(key)) for model in firsts.values())] for key in keys]
    return [["", *firsts], *(row for row in arguments if len(set(row[1:])) > 1)]


def _size_rows(models: Mapping[str, Sequence[RunRecord]]) -> list[list[str]]:
    """Parameters and cost of each model, where the runs record them."""
    firsts = [runs[0] for runs in models.values()]
    rows = []
    counts: dict[str, Callable[[RunRecord], Any]] = {
        "parameters": lambda run: run.start.get("parameters"),
        "GFLOPs a pair, forward": _gigaflops,
    }
    for label, count in counts.items():
        base, *others = map(count, firsts)
        if not any(is_number(x) for x in (base, *others)):
            continue
        row = [label, _count(base)]
        for other in others:
            change = other / base - 1 if is_number(base) and is_number(other) and base else None
            row += [_count(other), _change(change), ""]
        rows.append(row)
    return rows


def _gigaflops(run: RunRecord) -> float | None:
    arguments = dict(run.model)
    name = arguments.pop("name", None)
    if name not in MODELS or "vocab_size" not in arguments or not flops_are_known(MODELS[name]):
        return None
    return forward_flops(MODELS[name], **arguments).total / 1e9


def _count(value: Any) -> str:
    if not is_number(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _spread(spread: Spread | None, metric: Metric) -> str:
    if spread is None:
        return "–"
    return _fixed(spread.mean, metric) + (
        f" ± {_fixed(spread.deviation, metric)}" if spread.deviation is not None else ""
    )


def _difference(difference: Difference | None, metric: Metric) -> str:
    if difference is None:
        return "–"
    error = f" ± {_fixed(difference.error, metric)}" if difference.error is not None else ""
    mark = {True: " *", False: "", None: " ?"}[difference.beyond_spread]
    return _fixed(difference.mean, metric, sign="+") + error + mark


def _fixed(value: float, metric: Metric, *, sign: str = "") -> str:
    """The digits of the paper: four, or two in percent."""
    return f"{value * metric.factor:{sign}.{4 if metric.factor == 1 else 2}f}".replace("-", "−")


def _is_shown(spread: Spread, metric: Metric) -> bool:
    """Returns whether a mean is not 0 in the digits of the table; a change relative to 0 says nothing."""
    return any(digit in "123456789" for digit in _fixed(spread.mean, metric))


def _change(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:+.2f} %".replace("-", "−")


def _printed(numbers: tuple[float, float, float] | None) -> list[str]:
    if numbers is None:
        return ["", "", ""]
    baseline, ours, change = numbers
    return [f"{baseline:.4f}", f"{ours:.4f}", _change(change / 100)]


# In words


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each model but the first: its better and worse metrics, beyond the spread over seeds.

    Where endpoints were chosen it is about these alone.
    """
    base, *others = comparison.models
    chosen = {endpoint.metric.name for endpoint in comparison.endpoints}
    lines = [line for line in comparison.lines if not chosen or line.metric.name in chosen]
    sentences = []
    for i, name in enumerate(others):
        differences = [(line.metric, difference) for line in lines if (difference := line.differences[i]) is not None]
        groups: dict[str, list[str]] = {}
        for metric, difference in differences:
            group = "of unknown spread"
            if difference.beyond_spread is not None:
                better = (difference.mean < 0) == metric.lower_is_better
                beyond = "better beyond the spread" if better else "worse beyond the spread"
                group = beyond if difference.beyond_spread else "within the spread of the seeds"
            groups.setdefault(group, []).append(metric.label.removesuffix(", %"))
        parts = [
            f"{group} in {'everything' if len(labels) == len(differences) else ', '.join(labels)}"
            for group, labels in sorted(groups.items())
        ]
        over = " and ".join(sorted({_over(difference) for _, difference in differences}))
        sentences.append(f"{name} against {base}, {over}: {'; '.join(parts)}.")
    return sentences


def notes(comparison: Comparison) -> list[str]:
    """Sentences that explain the table."""
    lines = [
        "The numbers of a run are those of the weights that it saved: of its lowest CoCa loss, of its last step with "
        "run.keep_model=last and after fine-tuning, and of the highest accuracy of a classifier.",
        "± behind a value is the standard deviation over seeds; behind a difference, the standard error of its mean.",
        "* the 95 % interval of the difference excludes zero (t-test over seeds), which by chance it does for one of "
        "twenty numbers that do not differ. ? there are too few seeds to know.",
    ]
    if len({tuple(run.seed for run in runs) for runs in comparison.models.values()}) > 1:
        lines.append(
            "The models have different seeds: values and changes are of all seeds of a model, "
            "differences of those that both have, if these are two or more."
        )
    if comparison.published:
        lines.append("The paper's numbers are those of its table 2: one run each, on its own data.")
    return lines


def _over(difference: Difference) -> str:
    if difference.pairs == 0:
        return "over seeds that are not the same"
    return "by a single seed" if difference.pairs == 1 else f"over {difference.pairs} seeds in pairs"


def _written(comparison: Comparison, table: Callable[[Table], str], bullet: str) -> str:
    models = model_table(comparison.models)
    warning = ["The runs differ in more than their models:", *(bullet + line for line in comparison.unequal), ""]
    return "\n".join(
        [
            *(warning if comparison.unequal else []),
            table(result_table(comparison)),
            "",
            *(line for one in experiment_tables(comparison) for line in (one.title + ":", "", table(one.table), "")),
            *(bullet + line for line in verdicts(comparison) + notes(comparison)),
            "",
            *([table(models), ""] if len(models) > 1 else []),
            table(run_table(comparison.models)),
            "",
        ]
    )


# The page


def _header(title: str, comparison: Comparison) -> str:
    return header(title, f"{sum(map(len, comparison.models.values()))} runs")


def _numbers(comparison: Comparison) -> str:
    warning = ""
    if comparison.unequal:
        warning = "<p>The runs differ in more than their models:</p>" + _list(comparison.unequal)
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdicts(comparison))
    return section(
        "Results", "", f"{warning}{sentences}{html(result_table(comparison), stacked=True)}{_list(notes(comparison))}"
    )


def _endpoints(comparison: Comparison) -> str:
    """The tests of the endpoints, the factorial analysis and the figures; nothing without a primary metric."""
    tables = "".join(f"<h3>{escape(one.title)}</h3>{html(one.table)}" for one in experiment_tables(comparison))
    return section("Endpoints", "", tables + "".join(figures(comparison).values()))


def _curves(models: Mapping[str, Sequence[RunRecord]]) -> str:
    def curves(key: str, factor: float = 1) -> list[Series]:
        thin, thick = [], []
        for i, (name, runs) in enumerate(models.items()):
            color = COLORS[i % len(COLORS)]
            if len(runs) > 1:
                thin += [series(run.validations, key, name, color, factor=factor, style="thin") for run in runs]
            thick.append(series(_mean_rows(runs, key), key, name, color, factor=factor))
        return thin + thick

    charts = [
        chart("CoCa loss", curves("loss"), unit="nats", wide=True),
        chart("Perplexity", curves("perplexity"), unit="logarithmic", wide=True, log=True),
        chart("Contrastive loss", curves("contrastive_loss"), unit="nats", wide=True),
        chart(
            "R@1, text to image",
            curves("text_to_image_r1", 100),
            unit="%",
            wide=True,
            low=0,
            levels=[Level(f"chance among {n:,} images", 100 / n) for n in _eval_images(models)],
        ),
    ]
    note = "Validation: a thin line for each seed, a thick line for their mean."
    return section("Curves", note, f"<div class=charts>{''.join(charts)}</div>" if any(charts) else "")


def _eval_images(models: Mapping[str, Sequence[RunRecord]]) -> list[int]:
    """The numbers of images that the runs retrieve among."""
    rows = [row for runs in models.values() for run in runs for row in run.validations]
    return sorted({row["num_eval_images"] for row in rows if row.get("num_eval_images")})


def _mean_rows(runs: Sequence[RunRecord], key: str) -> list[dict[str, Any]]:
    """The mean over some runs at the steps at which all of them were validated."""
    values = [{row["step"]: row[key] for row in run.validations if is_number(row.get(key))} for run in runs]
    steps = sorted(set.intersection(*map(set, values)))
    return [{"step": step, key: fmean(one[step] for one in values)} for step in steps]


def _what_was_run(comparison: Comparison) -> str:
    models, conditions = model_table(comparison.models), next(iter(comparison.models.values()))[0].conditions
    equal = "\n".join(f"{key}: {value}" for key, value in sorted(conditions.items()))
    differ = html(models) if len(models) > 1 else ""
    return (
        f"<section class=files><h2>Configurations</h2>{differ}{html(run_table(comparison.models), stacked=True)}"
        f"<details><summary>conditions of the first run</summary><pre>{escape(equal)}</pre></details></section>"
    )


def _list(lines: Sequence[str]) -> str:
    return f"<ul class=notes>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
