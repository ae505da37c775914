"""The comparison as a user meets it: a table of real runs, a page, and a refusal."""

import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from grr import config
from grr.experiments.metrics import metric
from grr.experiments.sweep import MODEL, Job, plan
from grr.training.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
CONFIGS = sorted((RECIPES / "configs/compare").glob("*.yaml"))


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Done]:
    """Run a recipe with a command line, from the top of the checkout, in this process: torch is imported already."""

    def run(recipe: str, *words: str) -> Done:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}", *words])
        status, said = 0, ""
        try:
            runpy.run_path(f"recipes/{recipe}", run_name="__main__")
        except SystemExit as end:  # with a text, which Python prints before it leaves with status 1
            status, said = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err + said)

    return run


@pytest.fixture
def compare(run, tmp_path) -> Callable[..., Done]:
    def compare(models: list[str], *overrides: str) -> Done:
        file = tmp_path / "compare.yaml"
        file.write_text(yaml.safe_dump({"run": {"models": models, "folder": str(tmp_path / "out")}}))
        return run("compare.py", "--config", str(file), *overrides)

    return compare


@pytest.mark.slow
def test_runs_of_a_sweep_are_compared_by_their_best_validations(swept, tmp_path, compare):
    models = [f"Baseline CoCa: {swept}/pretrain/baseline-*", f"GRR-CoCa: {swept}/pretrain/grr-*"]
    done = compare(models, "run.published=CC12M")
    assert done.status == 0, done.stderr[-3000:]

    def best(name: str) -> list[float]:
        logs = [read_metrics(swept / "pretrain" / f"{name}-{seed}") for seed in (0, 1)]
        return [min(line["loss"] for line in log if line["split"] == "validation") for log in logs]

    [row] = [line for line in done.stdout.splitlines() if line.startswith("CoCa loss")]
    shown = re.findall(r"[\d.]+", row)
    assert float(shown[0]) == pytest.approx(sum(best("baseline")) / 2, abs=6e-5)
    assert float(shown[2]) == pytest.approx(sum(best("grr")) / 2, abs=6e-5)
    assert shown[-3:] == ["3.2864", "3.0516", "7.15"]
    assert "GRR-CoCa against Baseline CoCa, over 2 seeds in pairs:" in done.stdout
    for key in ("vision_norm", "vision_feed_forward", "vision_position"):
        assert re.search(rf"^{key} ", done.stdout, re.MULTILINE)
    assert "text_norm" not in done.stdout
    assert (tmp_path / "out/comparison.md").read_text().startswith("|")
    assert (tmp_path / "out/comparison.html").read_text().count("<figure ") == 4


@pytest.mark.slow
def test_runs_that_may_not_be_compared_are_refused_unless_told_to(swept, tmp_path, compare):
    shutil.copytree(swept / "pretrain", tmp_path / "runs")
    file = tmp_path / "runs/grr-1/config.yaml"
    file.write_text(file.read_text().replace("  lr: 0.001", "  lr: 0.002"))
    shutil.rmtree(tmp_path / "runs/grr-0/model")
    models = [f"Baseline CoCa: {tmp_path}/runs/baseline-*", f"GRR-CoCa: {tmp_path}/runs/grr-*"]
    done = compare(models)
    assert done.status == 1
    assert f"{tmp_path}/runs/grr-0: is not finished" in done.stderr
    assert f"{tmp_path}/runs/grr-1: optimizer.lr is 0.002, in {tmp_path}/runs/baseline-0 it is 0.001" in done.stderr
    assert not (tmp_path / "out").exists()
    done = compare(models, "run.allow_differences=true")
    assert done.status == 0
    assert "grr-1: optimizer.lr is 0.002" in done.stdout


def test_a_folder_that_is_not_there_is_named(compare):
    done = compare(["a: nowhere/a-*", "b: nowhere/b-*"])
    assert done.status == 1
    assert f"no folder matches nowhere/a-* (a) in {ROOT}" in done.stderr


@pytest.fixture(scope="module")
def planned() -> list[Job]:
    """The runs that all sweeps leave, but those that only choose a learning rate."""
    jobs = []
    for file in sorted((RECIPES / "configs/sweep").glob("*.yaml")):
        grid = yaml.safe_load(file.read_text())["run"]
        if not file.stem.endswith("_lr"):
            jobs += plan(Path(grid["folder"]), grid["stages"], grid["variants"], grid["seeds"])
    models = [job for job in jobs if job.result == MODEL]
    return [job for job in models if not any(later.after is job and later.result == MODEL for later in models)]


def compared(file: Path, planned: list[Job], monkeypatch) -> list[list[Job]]:
    """The planned runs of each model of a config."""
    monkeypatch.syspath_prepend(str(RECIPES))
    import compare

    run = config.load(compare.SECTIONS, ["--config", str(file)]).get(compare.Run)
    patterns = [entry.partition(": ")[2] for entry in run.models]
    return [[job for job in planned if job.folder.match(pattern)] for pattern in patterns]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_compares_runs_that_sweeps_leave_each_model_with_one_variant(file, planned, monkeypatch):
    assert f"\n# python recipes/compare.py --config recipes/configs/compare/{file.name}\n" in file.read_text()
    models = compared(file, planned, monkeypatch)
    for runs in models:
        assert len({(job.folder.parent, job.variant) for job in runs}) == 1
        assert len(runs) > 1
    folders = [job.folder for runs in models for job in runs]
    assert len(set(folders)) == len(folders)


def test_every_variant_of_a_sweep_is_compared(planned, monkeypatch):
    seen = {job.folder for file in CONFIGS for runs in compared(file, planned, monkeypatch) for job in runs}
    for file in (RECIPES / "configs/scaling_law").glob("*.yaml"):
        patterns = [entry.partition(": ")[2] for entry in yaml.safe_load(file.read_text())["run"]["groups"]]
        groups = [[job.folder for job in planned if job.folder.match(pattern)] for pattern in patterns]
        assert all(len(group) >= 9 for group in groups)
        seen |= set().union(*groups)
    assert [str(job.folder) for job in planned if job.folder not in seen] == []


@pytest.mark.parametrize(
    "file", [file for file in CONFIGS if "primary" in file.read_text()], ids=lambda file: file.stem
)
def test_endpoints_of_configs_exist(file):
    run = yaml.safe_load(file.read_text())["run"]
    assert len({metric(name) for name in (run["primary"], *run["secondary"])}) == 1 + len(run["secondary"])
