"""An export as a user makes it: one command, and a folder that captions a picture where there is no torch."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
from PIL import Image

from grr.checkpoint.model_folder import save_model
from grr.data.images import load_image
from grr.generation.generate import generate
from grr.inference.pretrained import describe, load_pretrained
from grr.models.builders import grr_coca_tiny
from grr.tokenizers import train_tokenizer

pytest.importorskip("onnxruntime", reason='pip install "grr-coca[export]"')
pytest.importorskip("onnxscript", reason='pip install "grr-coca[export]"')
RECIPE = Path(__file__).resolve().parents[2] / "recipes/export.py"
CONFIGS = sorted((RECIPE.parent / "configs/export").glob("*.yaml"))
WITHOUT = "import sys; sys.modules.update(torch=None, grr=None); sys.argv = sys.argv[1:]; import runpy; "
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(["a red fox on a blue hill"] * 3, folder / "t.model", vocab_size=64, context_length=16)
    arguments = {
        "vocab_size": tokenizer.vocab_size,
        "context_length": 16,
        "image_size": 32,
        "vision_layers": 1,
        "text_layers": 1,
        "multimodal_layers": 1,
    }
    torch.manual_seed(0)
    save_model(
        folder / "model", grr_coca_tiny(**arguments), describe("grr_coca_tiny", arguments, "center"), folder / "t.model"
    )
    return folder / "model"


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )


@pytest.mark.slow
def test_a_copied_recipe_writes_a_folder_that_captions_without_torch(model_folder, tmp_path):
    shutil.copy(RECIPE, tmp_path / "mine.py")
    config = "--config", str(CONFIGS[0])
    options = [f"model.path={model_folder}", "run.folder=out", "run.pixels=float32"]
    done = programs.run(["mine.py", *config, *options], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [line.split()[0] for line in done.stderr.splitlines()]
    assert steps == ["tracing", "writing", "writing"] * 3, done.stderr  # and no warning of torch
    assert re.findall(r"^(\w+\.\w+) ", done.stdout, re.MULTILINE) == [
        "image.onnx",
        "image.pt2",
        "text.onnx",
        "text.pt2",
        "step.onnx",
        "step.pt2",
    ]
    assert json.loads((tmp_path / "out/config.json").read_text())["max_new_tokens"] == 13
    picture = tmp_path / "picture.png"
    Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 50).convert("RGB").save(picture)

    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    example = f"{WITHOUT}runpy.run_path({str(tmp_path / 'elsewhere/run_onnx.py')!r}, run_name='__main__')"
    used = run("-c", example, "run_onnx.py", str(picture), "a red fox", "a hill", cwd=tmp_path)
    assert used.returncode == 0, used.stderr[-3000:]
    caption, *lines = used.stdout.splitlines()
    model, tokenizer, size, crop = load_pretrained(model_folder)
    image = load_image(picture, size=size, crop=crop)[None]
    assert caption == generate(model, image, tokenizer)[0]
    ids = torch.tensor([tokenizer.encode(sentence) for sentence in ("a red fox", "a hill")])[:, :16]
    scores = (model.encode_text(ids) @ model.encode_image(image)[0]).tolist()
    assert [float(line.split()[0]) for line in lines] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--config", str(file), "model.path=nowhere"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert end.value.code == 1
    assert "find_pretrained: nowhere holds no model" in capsys.readouterr().err
    assert f"recipes/export.py --config recipes/configs/export/{file.name}" in file.read_text().split("\nrun:")[0]
