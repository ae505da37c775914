"""Compare runs: the paper's table 2 with the spread over seeds, and curves.

    python recipes/compare.py --config recipes/configs/compare/ablation.yaml
    python recipes/compare.py --config recipes/configs/compare/ablation.yaml \\
        run.models='["Baseline CoCa: runs/ablation/finetune/baseline-*", "GRR-CoCa: runs/ablation/finetune/grr-*"]'

Prints the table, and writes it with the validation curves to comparison.md and comparison.html, and the values of all
runs to comparison.csv.
"""

from dataclasses import dataclass, field
from pathlib import Path

from grr import config
from grr.cli.program import run_main
from grr.experiments.compare import DataSet, compare
from grr.experiments.runs import read_models
from grr.reports.comparison import as_text, write_comparison


@dataclass
class Run:
    """Options of the recipe."""

    models: list[str]  # "name: folders, one per seed", with wildcards; the first is the baseline
    folder: str = "runs/comparison"  # where the tables, the page and the figures are written
    published: DataSet | None = None  # show the paper's metrics for this data set as well
    primary: str | None = None  # the metric that decides, chosen before the runs: captioning_loss, losses.loss ...
    secondary: list[str] = field(default_factory=list)  # further metrics, tested with Holm's correction
    differ: list[str] = field(default_factory=list)  # conditions that belong to a model, such as optimizer.lr
    allow_differences: bool = False  # compare runs of unequal conditions, and list the differences


SECTIONS: config.Sections = {"run": Run}


def main() -> None:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    models = read_models(run.models)
    comparison = compare(
        models,
        published=run.published,
        primary=run.primary,
        secondary=run.secondary,
        differ=run.differ,
        allow_differences=run.allow_differences,
    )
    print(as_text(comparison))
    print(f"see {write_comparison(Path(run.folder), comparison)}, and comparison.md beside it")


if __name__ == "__main__":
    run_main(main)
