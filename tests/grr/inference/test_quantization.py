"""A quantised model stays close to what it was, is smaller on disk, and opens as every model does."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from grr.checkpoint.model_folder import save_model_state
from grr.generation.generate import generate
from grr.inference.pretrained import build_pretrained, describe, find_pretrained, load_pretrained, load_weights
from grr.inference.quantization import GROUP, SCHEMES, quantize, quantized_state
from grr.models.builders import grr_coca_tiny, original_coca
from grr.tokenizers import train_tokenizer

torchao = pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
ANYWHERE = [scheme for scheme in SCHEMES if scheme != "int4_weight_only"]
STEP = {
    "int8_weight_only": 1 / 254,
    "int8_dynamic": 1 / 254,
    "float8_weight_only": 1 / 16,
    "int4_grouped": 1 / 15 * (1 + 16 / 256),
}
# half a step, of the largest number of a row or group: int8 has 127 steps on either side of zero, int4 7.5 whose size
# is rounded to bfloat16, by up to 1/256, e4m3 three binary digits behind the first one
ARGUMENTS = {"vocab_size": 96, "context_length": 16, "image_size": 32, "dim": 64, "tied_embeddings": True}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    tokenizer = train_tokenizer([f"{a} {b} fox sings" for a in "abcdefgh" for b in "ijklmnop"], file, vocab_size=96)
    ARGUMENTS["vocab_size"] = tokenizer.vocab_size
    return file


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return grr_coca_tiny(**ARGUMENTS).eval()


def some_images(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def saved(scheme: str, vocabulary: Path, folder: Path) -> tuple[Path, nn.Module]:
    model = a_model()
    quantize(model, scheme)
    description = describe("grr_coca_tiny", ARGUMENTS, "center", scheme)
    save_model_state(folder, quantized_state(model), description, vocabulary)
    return folder, model


# Laws


@settings(max_examples=60)
@given(
    scheme=st.sampled_from(ANYWHERE),
    rows=st.integers(1, 40),
    columns=st.integers(16, 64) | st.sampled_from([GROUP, 3 * GROUP]),
    log_scale=st.integers(-4, 4),
    seed=st.integers(0, 99),
)
def test_no_weight_moves_by_more_than_half_a_step_of_its_row(scheme, rows, columns, log_scale, seed):
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**log_scale)
    before = layer.weight.detach().clone()
    quantize(layer, scheme)
    grouped = scheme == "int4_grouped" and columns % GROUP == 0
    step = STEP["int8_weight_only" if scheme == "int4_grouped" and not grouped else scheme]
    moved = (layer.weight.dequantize() - before).unflatten(1, (-1, GROUP if grouped else columns))
    largest = before.view_as(moved).abs().amax(-1, keepdim=True)
    assert (moved.abs() <= step * largest * 1.001).all()
    assert moved.any()


@pytest.mark.parametrize("scheme", ANYWHERE)
def test_every_matrix_of_a_layer_is_quantised_and_nothing_else(scheme):
    model, plain = a_model(), a_model()
    quantize(model, scheme)
    layers = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    for name, value in plain.state_dict().items():
        after = model.state_dict()[name]
        assert (type(after) is torch.Tensor) == (name not in layers), name
        if name not in layers:
            assert torch.equal(after, value), name
    assert not any(p.requires_grad for p in model.parameters())


# Agreement


@pytest.mark.parametrize("scheme", ANYWHERE)
@pytest.mark.parametrize("build", [grr_coca_tiny, original_coca])
@torch.no_grad()
def test_embeddings_and_logits_stay_close(scheme, build):
    sizes = {
        "vocab_size": 96,
        "context_length": 16,
        "image_size": 32,
        "patch_size": 8,
        "dim": 64,
        "num_heads": 2,
        "vision_layers": 2,
        "text_layers": 2,
        "multimodal_layers": 2,
    }
    torch.manual_seed(0)
    plain, model = build(**sizes).eval(), build(**sizes).eval()
    model.load_state_dict(plain.state_dict())
    quantize(model, scheme)
    ids = torch.randint(3, 90, (3, 12))
    expected, output = plain(some_images(), ids), model(some_images(), ids)
    for a, b in zip(expected[:2], output[:2], strict=True):
        assert ((a * b).sum(-1) > 0.99).all()
    assert torch.nn.functional.cosine_similarity(expected.logits, output.logits, dim=-1).min() > 0.99


# Use


@pytest.mark.parametrize("scheme", ANYWHERE)
def test_a_folder_opens_by_the_one_call_and_is_the_model_that_was_quantised(scheme, vocabulary, tmp_path):
    folder, model = saved(scheme, vocabulary, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["quantization"] == scheme
    assert find_pretrained(folder).quantization == scheme
    opened, tokenizer, image_size, crop = load_pretrained(folder)
    assert (tokenizer.context_length, image_size, crop, opened.training) == (16, 32, "center", False)
    assert torch.equal(opened.encode_image(some_images()), model.encode_image(some_images()))
    assert generate(opened, some_images(), tokenizer) == generate(model, some_images(), tokenizer)
    plain = sum(p.nbytes for p in a_model().parameters())
    assert (folder / "model.safetensors").stat().st_size < 0.45 * plain


def test_two_numbers_of_4_bits_stand_in_a_byte(vocabulary, tmp_path):
    folder, model = saved("int4_grouped", vocabulary, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            rows, columns = layer.weight.shape
            packed = columns % GROUP == 0
            assert weights[f"{name}.weight.qdata"].nbytes == rows * columns // (2 if packed else 1)
            assert weights[f"{name}.weight.scale"].nbytes == rows * (columns // GROUP * 2 if packed else 4)
            assert not (packed and f"{name}.weight.zero_point" in weights)
    assert any(layer.in_features % GROUP for layer in model.modules() if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("scheme", ANYWHERE)
def test_a_folder_opens_in_bfloat16_as_well(scheme, vocabulary, tmp_path):
    folder, model = saved(scheme, vocabulary, tmp_path / "model")
    half = load_pretrained(folder, dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert ((half.encode_image(some_images()) * model.encode_image(some_images())).sum(-1) > 0.99).all()


@pytest.mark.gpu
def test_int4_opens_on_a_gpu(vocabulary, tmp_path):
    model = a_model().to("cuda", torch.bfloat16)
    before = model.encode_image(some_images().cuda())
    quantize(model, "int4_weight_only")
    description = describe("grr_coca_tiny", ARGUMENTS, "squash", "int4_weight_only")
    save_model_state(tmp_path / "model", quantized_state(model), description, vocabulary)
    opened = load_pretrained(tmp_path / "model", device="cuda", dtype=torch.bfloat16).model
    assert torch.equal(opened.encode_image(some_images().cuda()), model.encode_image(some_images().cuda()))
    assert ((opened.encode_image(some_images().cuda()) * before).sum(-1) > 0.9).all()


def test_an_unknown_scheme_is_refused(vocabulary, tmp_path):
    with pytest.raises(ValueError, match=r"quantize: scheme must be one of int8_weight_only, .*, got 'int3'"):
        quantize(a_model(), "int3")
    folder, _ = saved("int8_dynamic", vocabulary, tmp_path / "model")
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | {"quantization": "int3"}))
    with pytest.raises(ValueError, match=r"find_pretrained: .* quantization must be one of .*, got 'int3'"):
        load_pretrained(folder)


def test_int4_on_a_cpu_is_refused_whether_it_is_made_or_opened(vocabulary, tmp_path):
    with pytest.raises(ValueError, match=r"int4_weight_only needs a model in bfloat16 on a CUDA GPU .* got torch.fl"):
        quantize(a_model(), "int4_weight_only")
    folder, _ = saved("int8_dynamic", vocabulary, tmp_path / "model")
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | {"quantization": "int4_weight_only"}))
    with pytest.raises(ValueError, match=r"int4_weight_only needs .* got torch.bfloat16 on cpu"):
        load_pretrained(folder, dtype=torch.bfloat16)


def test_a_quantised_model_is_not_trained_on(vocabulary, tmp_path):
    source = find_pretrained(saved("int8_dynamic", vocabulary, tmp_path / "model")[0])
    with pytest.raises(ValueError, match=r"load_weights: .* is quantised, by int8_dynamic, and cannot be trained on"):
        load_weights(source, build_pretrained(source))


def test_weights_that_do_not_fit_are_named(vocabulary, tmp_path):
    folder, _ = saved("int8_dynamic", vocabulary, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("multimodal_decoder.head.weight.scale")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"load_quantized: .* does not fit the model in multimodal_decoder.head.weight"
    ):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"load_quantized: .*model.safetensors cannot be read: .* copy it again"):
        load_pretrained(folder)


def test_without_torchao_the_remedy_is_told(vocabulary, tmp_path, monkeypatch):
    folder, _ = saved("int8_dynamic", vocabulary, tmp_path / "model")
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"torchao is not installed; pip install \"grr-coca\[quantize\]\""):
        load_pretrained(tmp_path / "copy")
