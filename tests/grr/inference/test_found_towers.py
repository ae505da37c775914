"""Pre-trained towers are found in folders and on the hub, described, loaded, and kept in model folders."""

import json
import re

import pytest
import torch
from local_hub import LocalHub, local_hub
from safetensors.torch import load_file, save_file
from tower_folders import PROCESSOR, SIZE, saved

import grr
from grr.checkpoint.model_folder import save_model
from grr.inference.pretrained import describe, find_pretrained
from grr.inference.towers import find_tower, load_tower
from grr.tokenizers import train_tokenizer

pytest.importorskip("transformers", reason='pip install "grr-coca[transformers]"')

SIZES = {"dim": 16, "num_heads": 2, "text_layers": 1, "multimodal_layers": 1, "vocab_size": 40, "context_length": 8}


def test_a_description_has_what_builds_the_tower_and_how_it_reads_images(tmp_path):
    saved("clip", tmp_path)
    tower = find_tower(f"hf/{tmp_path}")
    description = tower.description
    assert (description["library"], description["config"]["model_type"]) == ("transformers", "clip_vision_model")
    assert (description["mean"], description["std"]) == (PROCESSOR["image_mean"], PROCESSOR["image_std"])
    assert (description["image_size"], description["crop"]) == (SIZE, "squash_bicubic")
    assert description["source"] == str(tmp_path)
    assert json.loads(json.dumps(description)) == description
    assert len(tower.fingerprint()) == 64


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"resample": 2}, (32, "squash")),
        (
            {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 28}},
            (24, "clip"),
        ),
        ({"do_center_crop": True, "crop_size": 16, "resample": 2}, (16, "clip_bilinear")),
        ({"size": {"shortest_edge": 40}}, (40, "clip")),
        ({"size": 40}, (40, "squash_bicubic")),
    ],
)
def test_size_and_crop_follow_the_image_processor(tmp_path, changes, expected):
    saved("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))
    description = find_tower(f"hf/{tmp_path}").description
    assert (description["image_size"], description["crop"]) == expected


def test_a_model_folder_opens_again_with_equal_outputs(tmp_path):
    saved("siglip", tmp_path / "tower")
    tokenizer = train_tokenizer(["a red fox", "a blue owl"] * 20, tmp_path / "words", vocab_size=40, context_length=8)
    tower = find_tower(f"hf/{tmp_path / 'tower'}")
    arguments = tower.arguments | {**SIZES, "vocab_size": tokenizer.vocab_size}
    torch.manual_seed(0)
    model = grr.create_model("tower_coca", **arguments)
    load_tower(tower, model)
    folder = tmp_path / "model"
    save_model(folder, model, describe("tower_coca", arguments, "squash_bicubic"), tmp_path / "words")
    (tmp_path / "tower").rename(tmp_path / "away")
    captioner = grr.load(folder)
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(captioner.model.encode_image(pixels), model.eval().encode_image(pixels))
    captioner.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in load_file(folder / "model.safetensors").items())
    assert json.loads((tmp_path / "again/config.json").read_text())["arguments"]["vision_config"] == tower.description
    in_bf16 = grr.load(folder, dtype=torch.bfloat16)
    cosine = (in_bf16.embed_images(list(pixels)) * captioner.embed_images(list(pixels))).sum(-1)
    assert (cosine > 0.99).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library": 3}, "vision_config must describe a tower by library, config"),
        ({"config": {"model_type": "vit", "hidden_size": 10**12}}, "numbers of vision_config must be from"),
        ({"config": {"model_type": "vit", "name": "x" * 2**17}}, "vision_config must describe a tower by library"),
        (
            {"config": {"model_type": "vit"}},
            r"a model of 8\d,\d{3},\d{3} parameters, more than the 1,000,000",
        ),
        ({"config": {"model_type": "nothing"}}, "does not describe a model"),
    ],
)
def test_an_edited_description_is_refused(tmp_path, change, message):
    saved("vit", tmp_path / "tower")
    tower = find_tower(f"hf/{tmp_path / 'tower'}")
    arguments = tower.arguments | SIZES | {"vision_config": tower.description | change}
    (tmp_path / "config.json").write_text(json.dumps(describe("tower_coca", arguments, "squash")))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10**6)
    with pytest.raises(ValueError, match=message):
        find_pretrained(tmp_path)


def test_a_description_cannot_name_code_or_files_to_load(tmp_path):
    """Attention kernels and quantisers are looked up by such names: they are left out."""
    saved("vit", tmp_path)
    tower = find_tower(f"hf/{tmp_path}")
    evil = {
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "auto_map": {"AutoModel": "x.y"},
    }
    config = tower.description["config"] | evil | {"quantization_config": {"quant_method": "awq"}}
    model = grr.create_model(
        "tower_coca", **tower.arguments | SIZES | {"vision_config": tower.description | {"config": config}}
    )
    assert model.vision_encoder.inner.config._attn_implementation in ("sdpa", "eager")


def mistakes(folder):
    """Names of towers, changes of the files of one, and what must be said of each."""
    yield "dinov2", {}, ValueError, r"must be hf/NAME, of transformers, or timm/NAME, got 'dinov2'"
    yield f"hff/{folder}", {}, ValueError, r"got 'hff/.*' \(did you mean hf\?\)"
    yield f"hf/{folder}/nothing", {}, FileNotFoundError, r"there is no folder .*nothing; name one in the layout of tran"
    yield (
        "hf/nope",
        {},
        FileNotFoundError,
        r"got 'hf/nope', and there is no folder nope; .* on the hub as hf/owner/name$",
    )
    yield "hf/my tower/x", {}, FileNotFoundError, r"got 'hf/my tower/x', and there is no folder my tower/x; name one in"
    yield f"hf/{folder}", {"config.json": None}, FileNotFoundError, r"must have a config.json of transformers, got the "
    yield f"hf/{folder}", {"config.json": "[]"}, ValueError, r"config.json of hf/.* must be a mapping"
    yield f"hf/{folder}", {"config.json": '{"model_type": "nothing"}'}, ValueError, r"must be a model of transformers 5"
    yield f"hf/{folder}", {"preprocessor_config.json": None}, ValueError, r"must have a preprocessor_config.json, whose"
    yield f"hf/{folder}", {"preprocessor_config.json": '{"size": 32}'}, ValueError, r"must have image_mean and image_st"
    yield (
        f"hf/{folder}",
        {"model.safetensors": None, "pytorch_model.bin": "x"},
        ValueError,
        r"must be model.safetensors, which holds no code, got pytorch_model.bin; name a revision that has it, or set",
    )
    wide = json.dumps(PROCESSOR | {"size": {"height": 32, "width": 64}})
    yield f"hf/{folder}", {"preprocessor_config.json": wide}, ValueError, r"images of hf/.* must be square, got"


@pytest.mark.parametrize("number", range(12))
def test_mistakes_are_named(tmp_path, number):
    saved("vit", tmp_path)
    name, changes, kind, message = list(mistakes(tmp_path))[number]
    for file, content in changes.items():
        (tmp_path / file).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / file).write_text(content)
    with pytest.raises(kind, match=message):
        find_tower(name)


def test_weights_that_do_not_fit_are_named(tmp_path):
    saved("vit", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(key for key in weights if "layernorm" in key and "layer." not in key and key.endswith("weight"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tower = find_tower(f"hf/{tmp_path}")
    model = grr.create_model("tower_coca", **tower.arguments | SIZES)
    with pytest.raises(
        ValueError, match=r"do not fit the encoder .*:\n  .*layernorm.weight: in the model, not in the fi"
    ):
        load_tower(tower, model)
    with pytest.raises(
        ValueError, match=r"the model must have a tower as its vision encoder, got VisionTransformer; bu"
    ):
        load_tower(tower, grr.grr_coca_tiny())


@pytest.mark.parametrize("size", [0, 5, 200, 5000])
def test_damaged_weights_are_named_when_the_folder_is_found(tmp_path, size):
    saved("vit", tmp_path)
    tower = find_tower(f"hf/{tmp_path}")
    model = grr.create_model("tower_coca", **tower.arguments | SIZES)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    message = rf"load_tower: {re.escape(str(file))} cannot be read: it is (empty|truncated).*; download or copy it"
    with pytest.raises(ValueError, match=message):
        find_tower(f"hf/{tmp_path}")
    with pytest.raises(ValueError, match=message):  # it was damaged after it was found
        load_tower(tower, model)
    assert find_tower(f"hf/{tmp_path}", weights="random").fingerprint() == "random"


def test_a_file_of_the_weights_that_is_missing_is_named(tmp_path):
    saved("vit", tmp_path).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert find_tower(f"hf/{tmp_path}").fingerprint().count("+") >= 1
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(file.name)} must be there, as model.safetensors.index.json "):
        find_tower(f"hf/{tmp_path}")


WORKER = """
import json, sys, torch, grr
from grr.inference.towers import find_tower, load_tower
name, revision = sys.argv[1], json.loads(sys.argv[2])
tower = find_tower(name, revision=revision)
model = grr.create_model("tower_coca", **tower.arguments, dim=16, num_heads=2, text_layers=1, multimodal_layers=1)
load_tower(tower, model)
value = model.vision_encoder.inner.state_dict()["layernorm.weight"].double().sum().item()
print(json.dumps([tower.description["source"], tower.fingerprint(), value]))
"""


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub", reason='pip install "grr-coca[hub]"')
    with local_hub() as server:
        yield server


def on_hub(hub: LocalHub, tmp_path, name: str, revision: str | None = None):
    from programs import run

    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    return run([str(worker), name, json.dumps(revision)], HF_HOME=str(tmp_path / "cache"), **hub.environment)


def test_a_tower_is_downloaded_once_at_the_revision_that_is_named(hub, tmp_path):
    first = saved("vit", tmp_path / "first").state_dict()["layernorm.weight"].double().sum().item()
    commit = hub.add("someone/vit", tmp_path / "first")
    weights = load_file(tmp_path / "first/model.safetensors")
    hub.add("someone/vit", {"config.json": (tmp_path / "first/config.json").read_bytes()})  # main moves on
    done = on_hub(hub, tmp_path, "hf/someone/vit", commit)
    assert done.returncode == 0, done.stderr[-3000:]
    source, digest, value = json.loads(done.stdout.splitlines()[-1])
    assert source == f"hf-hub:someone/vit@{commit}"
    assert len(digest) == 64
    assert value == pytest.approx(first, abs=1e-9)
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert len(weights) > 10
    again = on_hub(hub, tmp_path, "hf/someone/vit", commit)
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(hub.downloads()) == 3
    absent = on_hub(hub, tmp_path, "hf/someone/nothing")
    assert absent.returncode == 1
    assert "hf-hub:someone/nothing@main must be a repository that you may read" in absent.stderr
