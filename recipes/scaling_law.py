"""Fit scaling laws: how a loss falls with parameters and samples.

    python recipes/scaling_law.py --config recipes/configs/scaling_law/claim_scaling.yaml

Prints the exponents with their intervals, and writes them with a figure to scaling.md and scaling.svg.
"""

from dataclasses import dataclass
from pathlib import Path

from grr import config
from grr.cli.program import run_main
from grr.experiments.metrics import metric
from grr.experiments.runs import read_groups
from grr.experiments.scaling import scaling_law, scaling_points
from grr.files.atomic import write_atomic
from grr.reports.scaling import scaling_figure, scaling_table
from grr.reports.table import aligned, markdown


@dataclass
class Run:
    """Options of the recipe."""

    groups: list[str]  # "name: folders", with wildcards: runs of several sizes and lengths, one law for each group
    folder: str = "runs/scaling"  # where scaling.md and scaling.svg are written
    metric: str = "captioning_loss"  # the loss that is fitted


SECTIONS: config.Sections = {"run": Run}


def main() -> None:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    fitted = metric(run.metric)
    groups = read_groups(run.groups)
    laws = {name: scaling_law(runs, fitted, name) for name, runs in groups.items()}
    points = {name: scaling_points(runs, fitted) for name, runs in groups.items()}
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "scaling.md", markdown(scaling_table(laws)) + "\n")
    write_atomic(folder / "scaling.svg", scaling_figure(points, laws, fitted.label))
    print(aligned(scaling_table(laws)))
    print(f"see {folder / 'scaling.svg'}, and scaling.md beside it")


if __name__ == "__main__":
    run_main(main)
