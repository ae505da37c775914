"""A trained model comes back by one call, from wherever its run left it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from grr.checkpoint.model_folder import save_model
from grr.checkpoint.training_state import save_checkpoint
from grr.inference.pretrained import (
    build_pretrained,
    describe,
    find_pretrained,
    load_pretrained,
    load_weights,
    tell_of_other_crop,
)
from grr.models.builders import grr_coca_tiny
from grr.tokenizers import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, torch.nn.Module, Tokenizer]:
    """A run's folder as a recipe leaves it: a checkpoint of step 3, and another model as the finished one."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    folder.mkdir()
    tokenizer = train_tokenizer(["a red fox", "a blue bird sings"], folder / "tokenizer.model", context_length=16)
    arguments = {"vocab_size": tokenizer.vocab_size, "context_length": 16, "image_size": 32}
    torch.manual_seed(0)
    model = grr_coca_tiny(**arguments)
    description = describe("grr_coca_tiny", arguments, "center")
    progress = {"step": 3, "model": description}
    save_checkpoint(folder / "checkpoints", model, torch.optim.AdamW(model.parameters()), progress)
    with torch.no_grad():
        model.contrastive_pooler.queries.mul_(2)
    save_model(folder / "model", model, description, folder / "tokenizer.model")
    return folder, model, tokenizer


def test_a_runs_folder_and_its_model_are_the_finished_model(finished):
    folder, model, tokenizer = finished
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids = torch.tensor([tokenizer.encode("a red bird")])[:, :16]
    for path in (folder, folder / "model", str(folder)):
        loaded, tok, image_size, crop = load_pretrained(path)
        assert not loaded.training
        assert (tok.fingerprint, tok.context_length, image_size, crop) == (tokenizer.fingerprint, 16, 32, "center")
        model.eval()
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
        assert torch.equal(loaded.encode_text(ids), model.encode_text(ids))


def test_a_checkpoint_is_the_model_of_its_step(finished):
    folder, model, _ = finished
    loaded = load_pretrained(folder / "checkpoints/step_3").model
    assert torch.equal(2 * loaded.contrastive_pooler.queries, model.contrastive_pooler.queries)
    for name, value in model.state_dict().items():
        if name != "contrastive_pooler.queries":
            assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("path", ["model", "checkpoints/step_3"])
def test_either_is_opened_in_another_precision(finished, path):
    whole, half = (load_pretrained(finished[0] / path, dtype=dtype).model for dtype in (torch.float32, torch.bfloat16))
    for name, value in half.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name].bfloat16()), name


def test_a_run_that_goes_on_is_its_newest_checkpoint(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    assert find_pretrained(tmp_path / "run").path == tmp_path / "run/checkpoints/step_3"


def test_weights_come_in_the_dtype_that_is_asked_for(finished):
    model = load_pretrained(finished[0], dtype=torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).isfinite().all()


def test_arguments_may_be_changed_for_training_on(finished):
    source = find_pretrained(finished[0])
    model = build_pretrained(source, dropout=0.3)
    load_weights(source, model)
    assert model.vision_encoder.blocks[0].dropout.p == 0.3
    assert torch.equal(
        model.state_dict()["multimodal_decoder.head.weight"], finished[1].state_dict()["multimodal_decoder.head.weight"]
    )


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model; give the folder of a run that was trained"):
        find_pretrained(tmp_path)


@pytest.mark.parametrize("path", ["", None, b"runs", 3])
def test_a_path_that_is_none_is_named(path):
    with pytest.raises(
        ValueError, match=f"find_pretrained: path must be a folder's, got {path!r}; give the folder of a"
    ):
        find_pretrained(path)


def test_a_file_of_a_model_is_refused_with_its_folder(finished):
    folder = finished[0] / "model"
    with pytest.raises(ValueError, match=f"got the file .*model.safetensors; give the folder that holds it, {folder}"):
        find_pretrained(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["bf16", None, torch.int8, float])
def test_a_dtype_that_is_not_torchs_is_named(finished, dtype):
    with pytest.raises(ValueError, match=r"dtype must be a torch dtype of floats, such as torch\.bfloat16, got dtype="):
        load_pretrained(finished[0], dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", 2.5])
def test_a_device_that_is_not_there_is_named(finished, device):
    with pytest.raises(ValueError, match=f"load_pretrained: device must be .*, got {device!r} .*; leave device out"):
        load_pretrained(finished[0], device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_a_gpu_on_a_machine_without_one_is_refused(finished):
    with pytest.raises(ValueError, match="got 'cuda' and 0 CUDA GPUs are available; leave device out"):
        load_pretrained(finished[0], device="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"builder": "mine"}, "names the builder 'mine'"),
        ({"rotary_pairing": "interleaved"}, "rotary pairing 'interleaved'"),
        ({"crop": "stretch"}, "crop must be one of squash, center, clip, .*, got 'stretch'"),
        ({"arguments": None}, "does not describe a model"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(finished, tmp_path, change, message):
    shutil.copytree(finished[0] / "model", tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        find_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 10**9}, r"dim must be from 1 to 65,536, got 1000000000; was it edited\?"),
        ({"dim": 65_536}, r"describes a model of [\d,]+ parameters, more than the [\d,]+ bytes of weights beside"),
        ({"vision_layers": 10**6}, "vision_layers must be from 0 to 1,000"),
        ({"text_layers": 1000}, "describes a model of [\\d,]+ parameters, more than"),
        ({"image_size": 10**6}, "image_size must be from 1 to 4,096"),
        ({"image_size": True}, "image_size must be a whole number, got True"),
        ({"vocab_size": 2**40}, "vocab_size must be from 5 to 16,777,216"),
        ({"num_heads": -1}, "num_heads must be from 1 to 4,096, got -1"),
        ({"num_heads": 3}, "does not describe a model: .*num_heads"),
        ({"patch_size": 0}, "patch_size must be from 1 to"),
        ({"dropout": float("nan")}, "dropout must be from 0 to 1, got nan"),
        ({"logit_bias": float("inf")}, "logit_bias must be from -16,777,216 to 16,777,216, got inf"),
        ({"vision_norm": {"a": 1}}, "vision_norm must be a number or a short name, got a dict"),
        ({"vision_norm": "x" * 1000}, "vision_norm must be a number or a short name, got a str"),
        ({"vision_norm": "batch"}, "does not describe a model: .*batch"),
        ({"dim": [64] * 1000}, "dim must have at most 100 values, got 1,000"),
        ({"dim": [64, 64]}, "does not describe a model"),
        ({"shell": "rm"}, "gives grr_coca_tiny the argument 'shell', which it does not have"),
        ({"context_length": None}, "context_length must be a whole number, got None"),
    ],
)
@pytest.mark.parametrize("where", ["model", "checkpoints/step_3"])
def test_arguments_that_no_model_has_are_refused_before_anything_is_built(finished, tmp_path, change, message, where):
    shutil.copytree(finished[0], tmp_path / "run")
    file = tmp_path / "run" / where / ("config.json" if where == "model" else "progress.json")
    content = json.loads(file.read_text())
    (content if where == "model" else content["model"])["arguments"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"find_pretrained: .*{message}"):
        load_pretrained(tmp_path / "run" / where)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "does not describe a model"),
        ("9" * 10_000, "is not JSON"),
        (" " * (2**24 + 1), "is not JSON .*at most 16,777,216 are read"),
        (
            '{"format": 1, "builder": ["a"], "arguments": {}, "rotary_pairing": 0, "crop": 0}',
            r"names the builder \['a'\]",
        ),
    ],
)
@pytest.mark.parametrize("where", ["model/config.json", "checkpoints/step_3/progress.json"])
def test_a_description_that_is_not_one_is_refused(finished, tmp_path, content, message, where):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / where).write_text(content if "model" in where else f'{{"step": 3, "model": {content}}}')
    with pytest.raises(ValueError, match=rf"find_pretrained: .*{message}"):
        find_pretrained((tmp_path / "run" / where).parent)


def test_a_damaged_description_is_refused(finished, tmp_path):
    shutil.copytree(finished[0] / "model", tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="is not JSON"):
        find_pretrained(tmp_path / "model")


def test_a_run_that_cuts_images_otherwise_is_told_so(finished, caplog):
    source = find_pretrained(finished[0])  # trained on crop="center"
    with caplog.at_level("INFO"):
        tell_of_other_crop(source, "center")
        assert not caplog.messages
        tell_of_other_crop(source, "squash")
    assert "set loader.crop=center to keep it" in caplog.text
