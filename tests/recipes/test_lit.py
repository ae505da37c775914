"""Locked-image tuning as a user meets it: lit.yaml, the folder of a vision encoder, and a folder of images."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from programs import run
from safetensors.torch import load_file, save_file
from tower_folders import PROCESSOR, SIZE, features, saved

import grr
from grr.training.log import read_metrics

pytest.importorskip("transformers", reason='pip install "grr-coca[transformers]"')
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = [
    "model.dim=16",
    "model.num_heads=2",
    "model.text_layers=1",
    "model.multimodal_layers=1",
    "model.num_queries=4",
    "tokenizer.vocab_size=64",
    "tokenizer.context_length=16",
    "run.batch_size=8",
    "run.micro_batch_size=4",
    "run.log_every=1",
    "run.epochs=2",
    "run.num_eval_images=4",
    "saving.every=2",
    "loader.workers=0",
    "schedule.warmup_steps=0",
    "data.path=photos",
    "validation.path=held",
    "validation.split=null",
    "data.split=null",
]
LORA = ["tuning.frozen=[]", "tuning.lora=vision_encoder", "tuning.projections=[q_proj,v_proj]", "tuning.rank=2"]
TOWER = "vision_encoder.inner."


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with photographs, some of them held out, and a pre-trained vision encoder."""
    folder = tmp_path_factory.mktemp("lit")
    saved("dinov2", folder / "dino")
    random = np.random.default_rng(0)
    for name, count in (("photos", 24), ("held", 8)):
        (folder / name).mkdir()
        lines = ["image,caption"]
        for i in range(count):
            colour, shape = ("red", "green", "blue")[i % 3], ("square", "field")[i % 2]
            pixels = random.integers(0, 80, (40, 48, 3), dtype=np.uint8)
            pixels[..., i % 3] += 150
            Image.fromarray(pixels).save(folder / name / f"{name}{i}.png")
            lines.append(f"{name}{i}.png,a {colour} {shape} number {i % 5}")
        (folder / name / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def lit(place: Path, folder: str, *overrides: str, tower: str = "hf/dino", **options):
    config = RECIPES / "configs/pretrain/lit.yaml"
    words = ["--config", str(config), *SMALL, f"model.vision_encoder={tower}", f"run.folder={folder}", *overrides]
    return run([str(RECIPES / "pretrain.py"), *words], cwd=place, **options)


@pytest.fixture(scope="module")
def locked(place) -> Path:
    """The folder of a run of six steps, that nothing disturbed, with a tower that keeps its weights."""
    done = lit(place, "locked")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"the weights of the vision encoder are those of {place / 'dino'}" in done.stderr
    return place / "locked"


def tower_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "model.safetensors")
    return {name.removeprefix(TOWER): value for name, value in weights.items() if name.startswith(TOWER)}


def losses(folder: Path) -> list[tuple]:
    lines = [line for line in read_metrics(folder) if line["split"] == "train"]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_a_locked_tower_keeps_its_weights_bit_for_bit_and_the_rest_learns(place, locked):
    original, kept = load_file(place / "dino/model.safetensors"), tower_of(locked / "model")
    assert sorted(x.sum().item() for x in original.values()) == sorted(x.sum().item() for x in kept.values())
    assert [step for step, *_ in losses(locked)] == [1, 2, 3, 4, 5, 6]
    validation = [line["loss"] for line in read_metrics(locked) if line["split"] == "validation"]
    assert validation[-1] < validation[0]
    counts = json.loads((locked / "manifest.json").read_text())["starts"][-1]
    frozen = sum(x.numel() for x in kept.values())
    assert counts["parameters"] - counts["trained_parameters"] == frozen


def test_config_and_manifest_record_the_tower_and_its_preprocessing(place, locked):
    model = yaml.safe_load((locked / "config.yaml").read_text())["model"]
    assert model["image_size"] == SIZE
    assert model["vision_config"]["mean"] == PROCESSOR["image_mean"]
    assert model["vision_config"]["source"] == str(place / "dino")
    assert yaml.safe_load((locked / "config.yaml").read_text())["loader"]["crop"] == "squash_bicubic"
    assert len(json.loads((locked / "manifest.json").read_text())["starts"][-1]["tower"]) == 64
    description = json.loads((locked / "model/config.json").read_text())
    assert (description["crop"], description["arguments"]["image_size"]) == ("squash_bicubic", SIZE)


def test_the_model_opens_without_the_towers_folder_and_computes_its_features(place, locked):
    other = place / "dino_moved"
    (place / "dino").rename(other)
    try:
        captioner = grr.load(locked)
    finally:
        other.rename(place / "dino")
    assert (captioner.image_size, captioner.crop) == (SIZE, "squash_bicubic")
    file = place / "held/held0.png"
    assert len(captioner.caption([file])) == 1
    assert captioner.embed_images(file).shape == (1, 16)
    from transformers import AutoModel

    tower = AutoModel.from_pretrained(place / "dino").eval()
    mean, std = (torch.tensor(PROCESSOR[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    pixels = captioner.preprocess(file)
    with torch.no_grad():
        torch.testing.assert_close(
            captioner.model.vision_encoder(((pixels / 255) - mean) / std),
            features(tower, ((pixels / 255) - mean) / std),
            rtol=0,
            atol=1e-6,
        )
        seen: list[torch.Tensor] = []
        captioner.model.vision_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        captioner.model.encode_image(pixels)
    torch.testing.assert_close(seen[0], ((pixels / 255) - mean) / std)


def test_a_stopped_run_continues_bit_for_bit_without_the_towers_folder(place, locked):
    done = lit(place, "stopped", "run.max_steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    other = place / "dino_away"
    (place / "dino").rename(other)
    try:
        done = lit(place, "stopped")
    finally:
        other.rename(place / "dino")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming stopped after step 2" in done.stderr
    assert losses(place / "stopped") == losses(locked)
    weights = "model/model.safetensors"
    assert (place / "stopped" / weights).read_bytes() == (locked / weights).read_bytes()
    refused = lit(place, "stopped", "tuning.frozen=[]")
    assert refused.returncode == 1
    assert "tuning.frozen is ['vision_encoder'] in the checkpoint and [] in the config" in refused.stderr


def test_a_run_continues_with_its_tower_at_another_path_and_with_no_other(place, locked):
    """Path by path; the tower is away where its name leads to the same folder, and read where it has moved."""
    assert lit(place, "moved", "run.max_steps=1").returncode == 0
    away, moved = place / "dino_moved_away", place / "dino_new"
    (place / "dino").rename(away)
    try:
        for step, name in enumerate((f"hf/{place / 'dino'}", "hf/dino/"), 2):
            done = lit(place, "moved", f"run.max_steps={step}", tower=name)
            assert done.returncode == 0, done.stderr[-3000:]
    finally:
        away.rename(place / "dino")
    shutil.copytree(place / "dino", moved)
    done = lit(place, "moved", "run.max_steps=5", tower="hf/dino_new")
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(moved)
    done = lit(place, "moved", tower="hf/dino_new")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(place / "moved") == losses(locked)
    weights = "model/model.safetensors"
    assert (place / "moved" / weights).read_bytes() == (locked / weights).read_bytes()
    assert yaml.safe_load((place / "moved/config.yaml").read_text())["model"]["vision_encoder"] == "hf/dino_new"

    saved("dinov2", place / "other_weights")
    file = place / "other_weights/model.safetensors"
    save_file({name: 2 * x for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
    saved("vit", place / "other_model")
    for name, message in (
        ("other_weights", r"tower is \w{64} in the checkpoint and \w{64} in the config \(SHA-256 of its weights\)"),
        ("other_model", r"model.vision_config is .*dinov2.* in the checkpoint and .*vit.* in the config"),
    ):
        refused = lit(place, "moved", "run.max_steps=7", tower=f"hf/{name}")
        assert refused.returncode == 1
        assert re.search(message, refused.stderr), refused.stderr[-3000:]


def test_evaluation_reads_the_model(place, locked):
    config = RECIPES / "configs/evaluate/photos.yaml"
    words = ["--config", str(config), f"model.path={locked}", "data.path=held", "data.split=null"]
    done = run([str(RECIPES / "evaluate.py"), *words, "run.folder=evaluated"], cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_low_rank_adapters_train_the_tower_and_are_merged(place):
    for steps in ("run.max_steps=2", "run.epochs=2"):  # a stop, and the rest
        done = lit(place, "lora", *LORA, steps)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming lora after step 2" in done.stderr
    whole = lit(place, "lora_whole", *LORA)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert losses(place / "lora") == losses(place / "lora_whole")
    before, after = tower_of(place / "lora/start"), tower_of(place / "lora/model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"encoder.layer.{i}.attention.{key}.weight" for i in (0, 1) for key in ("q_proj", "v_proj")}
    assert len(grr.load(place / "lora").caption([place / "held/held1.png"])) == 1
    checkpoint = next((place / "lora/checkpoints").iterdir())
    assert grr.load(checkpoint).embed_images(place / "held/held1.png").shape == (1, 16)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["tuning.frozen=[]", "parallel.activation_checkpointing=true"]])
def test_two_processes_load_and_train_as_one(place, locked, overrides):
    name = f"sharded{len(overrides)}"
    done = lit(place, name, *overrides, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    if overrides:
        assert lit(place, f"{name}_one", *overrides).returncode == 0
    one = place / f"{name}_one" if overrides else locked
    for (step, loss, norm), other in zip(losses(place / name), losses(one), strict=True):
        assert (step, loss, norm) == pytest.approx(other, rel=1e-4)
    if not overrides:
        for key, value in tower_of(one / "model").items():
            assert torch.equal(value, tower_of(place / name / "model")[key])


def test_weights_are_random_only_where_that_is_asked_for(place):
    bare = place / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((place / "dino/config.json").read_text())
    done = lit(place, "random", "run.max_steps=1", tower="hf/bare")
    assert done.returncode == 1
    assert "weights of hf/bare must be model.safetensors, which holds no code, got none; name a" in done.stderr
    done = lit(place, "random", "run.max_steps=1", "model.vision_weights=random", "tuning.frozen=[]", tower="hf/bare")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((place / "random/manifest.json").read_text())["starts"][-1]["tower"] == "random"


def test_a_truncated_tower_is_named_in_one_line_before_the_folder_of_the_run_is_made(place):
    saved("dinov2", place / "cut")
    file = place / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    done = lit(place, "refused", tower="hf/cut")
    assert done.returncode == 1
    assert "cut/model.safetensors cannot be read: it is truncated" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "refused").exists()


def test_a_config_is_checked_with_its_tower_before_a_run(place):
    words = [*SMALL, "model.vision_encoder=hf/dino", "run.folder=checked"]
    done = run(["-m", "grr.cli", "check", "pretrain/lit", *words], cwd=place)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tower_coca, " in done.stdout
    done = run(["-m", "grr.cli", "check", "pretrain/lit", *words, "model.vision_encoder=hf/nothing/at/all"], cwd=place)
    assert done.returncode == 1
    assert "there is no folder nothing/at/all; name one in the layout of transformers" in done.stdout


def test_the_config_of_a_run_loads_as_the_same_config(place, locked):
    done = run(
        [str(RECIPES / "pretrain.py"), "--config", "locked/config.yaml", "run.folder=again", "run.max_steps=1"],
        cwd=place,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(place / "again") == losses(locked)[:1]
