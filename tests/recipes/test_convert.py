"""A checkpoint of open_clip becomes a folder that opens by the same one call as every model."""

import importlib.util
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import run
from safetensors.torch import save_file

from grr.data.images import to_tensor
from grr.generation.generate import generate
from grr.inference.convert import convert_open_clip
from grr.inference.pretrained import build_pretrained, find_pretrained, load_pretrained
from grr.models.open_clip import open_clip_coca
from grr.tokenizers import ClipTokenizer

pytest.importorskip("ftfy", reason='pip install "grr-coca[clip]"')
RECIPE = Path(__file__).resolve().parents[2] / "recipes/convert.py"
CONFIGS = sorted((RECIPE.parent / "configs/convert").glob("*.yaml"))
PAIRS = ["t h", "th e</w>", "f o", "fo x</w>"]
SIZES = {
    "vocab_size": 519,
    "context_length": 12,
    "image_size": 24,
    "patch_size": 8,
    "vision_dim": 48,
    "vision_heads": 3,
    "vision_layers": 1,
    "num_queries": 6,
    "pooler_heads": 4,
    "dim": 32,
    "num_heads": 2,
    "text_layers": 1,
    "multimodal_layers": 1,
}


def block(name: str, d: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.ln_1.weight": (d,),
        f"{name}.ln_1.bias": (d,),
        f"{name}.attn.in_proj_weight": (3 * d, d),
        f"{name}.attn.in_proj_bias": (3 * d,),
        f"{name}.attn.out_proj.weight": (d, d),
        f"{name}.attn.out_proj.bias": (d,),
        f"{name}.ln_2.weight": (d,),
        f"{name}.ln_2.bias": (d,),
        f"{name}.mlp.c_fc.weight": (4 * d, d),
        f"{name}.mlp.c_fc.bias": (4 * d,),
        f"{name}.mlp.c_proj.weight": (d, 4 * d),
        f"{name}.mlp.c_proj.bias": (d,),
    }


def checkpoint() -> dict[str, torch.Tensor]:
    """Random weights by the names and of the shapes of an open_clip CoCa: one block a tower, widths 48 and 32."""
    words, d, c = 518, 32, 48
    shapes = {
        "visual.conv1.weight": (c, 3, 8, 8),
        "visual.class_embedding": (c,),
        "visual.positional_embedding": (10, c),
        "visual.ln_pre.weight": (c,),
        "visual.ln_pre.bias": (c,),
        "visual.attn_pool.query": (6, d),
        "visual.attn_pool.attn.q_proj_weight": (d, d),
        "visual.attn_pool.attn.k_proj_weight": (d, c),
        "visual.attn_pool.attn.v_proj_weight": (d, c),
        "visual.attn_pool.attn.in_proj_bias": (3 * d,),
        "visual.attn_pool.attn.out_proj.weight": (d, d),
        "visual.attn_pool.attn.out_proj.bias": (d,),
        "visual.attn_pool.ln_q.weight": (d,),
        "visual.attn_pool.ln_q.bias": (d,),
        "visual.attn_pool.ln_k.weight": (c,),
        "visual.attn_pool.ln_k.bias": (c,),
        "visual.ln_post.weight": (d,),
        "visual.ln_post.bias": (d,),
        "visual.proj": (d, d),
        "text.token_embedding.weight": (words, d),
        "text.cls_emb": (d,),
        "text.positional_embedding": (12, d),
        "text.ln_final.weight": (d,),
        "text.ln_final.bias": (d,),
        "text.text_projection": (d, d),
        "text_decoder.ln_final.weight": (d,),
        "text_decoder.ln_final.bias": (d,),
        "text_decoder.text_projection": (d, words),
        "logit_scale": (),
        **block("visual.transformer.resblocks.0", c),
        **block("text.transformer.resblocks.0", d),
        **block("text_decoder.resblocks.0", d),
        **block("text_decoder.cross_attn.0", d),
        "text_decoder.cross_attn.0.ln_1_kv.weight": (d,),
        "text_decoder.cross_attn.0.ln_1_kv.bias": (d,),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a checkpoint and a vocabulary, as a user would have downloaded them."""
    folder = tmp_path_factory.mktemp("downloads")
    torch.save(checkpoint(), folder / "open_clip_pytorch_model.bin")
    save_file(checkpoint(), folder / "open_clip_model.safetensors")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *PAIRS, ""]))
    return folder


def words(files: Path, folder: Path, *overrides: str, config: Path = CONFIGS[0]) -> list[str]:
    sizes = [f"model.{key}={value}" for key, value in SIZES.items()]
    return [
        "--config",
        str(config),
        f"run.checkpoint={files / 'open_clip_pytorch_model.bin'}",
        f"run.folder={folder}",
        f"run.merges={files / 'merges.txt'}",
        *sizes,
        *overrides,
    ]


def convert(monkeypatch, *arguments: str) -> int:
    """Run the recipe in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(RECIPE), run_name="__main__")
    return end.value.code


def test_the_folder_opens_by_the_one_call_and_holds_the_model(files, tmp_path, monkeypatch, capsys):
    convert(monkeypatch, *words(files, tmp_path / "models/coca"))
    model, tokenizer, image_size, crop = load_pretrained(tmp_path / "models/coca")
    assert isinstance(tokenizer, ClipTokenizer)
    assert (tokenizer.context_length, tokenizer.vocab_size, image_size, crop) == (12, 519, 24, "clip")
    parameters = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out.endswith(f"coca: open_clip_coca_vit_b_32, {parameters:,} parameters\n")

    expected = open_clip_coca(**SIZES)
    expected.load_state_dict(convert_open_clip(checkpoint(), expected))
    images = to_tensor(Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 50), size=image_size, crop=crop)[None]
    ids = torch.tensor([tokenizer.encode("the fox!")])[:, :12]
    assert torch.equal(model.encode_image(images), expected.eval().encode_image(images))
    assert torch.equal(model.encode_text(ids), expected.encode_text(ids))
    assert generate(model, images, tokenizer, num_beams=2) == generate(expected, images, tokenizer, num_beams=2)


@pytest.mark.slow
def test_a_copied_recipe_runs_from_another_folder(files, tmp_path):
    shutil.copy(RECIPE, tmp_path / "mine.py")
    done = run(["mine.py", *words(files, Path("models/coca"))], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert find_pretrained(tmp_path / "models/coca").builder == "open_clip_coca_vit_b_32"


def test_what_was_converted_can_be_fine_tuned_with_dropout(files, tmp_path, monkeypatch):
    convert(monkeypatch, *words(files, tmp_path / "model"))
    source = find_pretrained(tmp_path / "model")
    assert {key: source.arguments[key] for key in SIZES} == SIZES
    model = build_pretrained(source, dropout=0.5)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


def test_everything_that_is_missing_is_named_at_once_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # neither ftfy nor open_clip is installed
    config = ["--config", str(CONFIGS[0]), f"run.folder={tmp_path / 'model'}", "run.checkpoint=gone.bin"]
    assert convert(monkeypatch, *config) == 1
    first, *said = capsys.readouterr().err.splitlines()
    assert first == "convert:"
    assert all(word in line for word, line in zip(("gone.bin", "merges", "grr-coca[clip]"), said, strict=True))
    assert convert(monkeypatch, *config, "run.merges=gone.txt") == 1
    assert "the file gone.txt does not exist; run.merges is" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_safetensors_give_the_same_model(files, tmp_path, monkeypatch):
    convert(monkeypatch, *words(files, tmp_path / "a"))
    convert(monkeypatch, *words(files, tmp_path / "b", f"run.checkpoint={files / 'open_clip_model.safetensors'}"))
    states = [load_pretrained(tmp_path / name).model.state_dict() for name in "ab"]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_checkpoint_of_another_size_is_refused_before_anything_is_written(files, tmp_path, monkeypatch, capsys):
    assert convert(monkeypatch, *words(files, tmp_path / "model", "model.text_layers=2")) == 1
    assert "convert_open_clip: the checkpoint does not fit the model" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_names_its_command_and_asks_for_clips_own_vocabulary(file, files, tmp_path, monkeypatch, capsys):
    assert f"recipes/convert.py --config recipes/configs/convert/{file.name} run.checkpoint=FILE" in file.read_text()
    own = (f"run.merges={files / 'merges.txt'}", f"run.checkpoint={files / 'merges.txt'}", f"run.folder={tmp_path}")
    assert convert(monkeypatch, "--config", str(file), *own) == 1
    assert "the vocabulary must have model.vocab_size=49409 ids, got 519 in" in capsys.readouterr().err
