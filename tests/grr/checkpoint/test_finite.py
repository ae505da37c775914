"""Weights and outputs that are not finite are refused wherever they enter, by name and with a remedy."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from grr.checkpoint.finite import check_finite_outputs, check_finite_weights
from grr.checkpoint.training_state import save_checkpoint
from grr.cli import main
from grr.evaluation.zero_shot import embed_texts
from grr.generation.generate import generate
from grr.inference.pretrained import load_pretrained
from grr.inference.quantization import quantize, quantized_state

NAME = "multimodal_decoder.head.weight"
MESSAGE = rf"every weight must be a finite number, got NaN or infinity in 1 of \d+ tensors of .*: {NAME}; "


@pytest.fixture(params=[torch.nan, torch.inf], ids=str)
def ruined(request, colour_run, tmp_path) -> Path:
    """A model's folder, one of whose weights is not finite."""
    shutil.copytree(colour_run / "model", tmp_path / "ruined")
    file = tmp_path / "ruined/model.safetensors"
    weights = load_file(file)
    weights[NAME][0, 0] = request.param
    save_file(weights, file)
    return tmp_path / "ruined"


@given(
    sizes=st.lists(st.integers(0, 5), max_size=4),
    bad=st.sets(st.integers(0, 3)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]),
)
def test_the_tensors_that_are_not_finite_are_those_named(sizes, bad, dtype):
    weights = {f"w{i}": torch.zeros(size).to(dtype) for i, size in enumerate(sizes)}
    for i in bad:
        if i < len(sizes) and sizes[i]:
            weights[f"w{i}"] = torch.full((sizes[i],), torch.nan).to(dtype)
    wrong = [name for name, value in weights.items() if value.float().isnan().any()]
    if not wrong:
        check_finite_weights("load", weights | {"ids": torch.arange(3)}, "a file")
    else:
        with pytest.raises(ValueError, match=f"load: .* in {len(wrong)} of {len(weights)} .*: {', '.join(wrong[:3])}"):
            check_finite_weights("load", weights, "a file")


def test_a_model_a_checkpoint_and_a_quantised_model_are_not_opened(ruined, colour_run, tmp_path):
    with pytest.raises(ValueError, match=f"load_weights: {MESSAGE}"):
        load_pretrained(ruined)
    model = load_pretrained(colour_run).model
    shutil.copy(colour_run / "tokenizer.model", tmp_path)
    with torch.no_grad():
        model.multimodal_decoder.head.weight[0, 0] = torch.nan
    progress = {"step": 1, "model": json.loads((ruined / "config.json").read_text())}
    save_checkpoint(tmp_path / "checkpoints", model, torch.optim.AdamW(model.parameters()), progress)
    with pytest.raises(ValueError, match=f"load_weights: {MESSAGE}"):
        load_pretrained(tmp_path / "checkpoints/step_1")
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=f"quantize: {MESSAGE}"):
        quantize(model, "int8_weight_only")
    sound = load_pretrained(colour_run).model
    quantize(sound, "int8_weight_only")
    state = quantized_state(sound)
    state[f"{NAME}.scale"] = torch.full_like(state[f"{NAME}.scale"], torch.inf)
    save_file({name: value.contiguous().clone() for name, value in state.items()}, ruined / "model.safetensors")
    described = json.loads((ruined / "config.json").read_text()) | {"quantization": "int8_weight_only"}
    (ruined / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"load_quantized: every weight must be a finite .*head.weight.scale"):
        load_pretrained(ruined)


def test_weights_too_large_for_half_precision_are_refused(colour_run, tmp_path):
    shutil.copytree(colour_run / "model", tmp_path / "large")
    weights = load_file(tmp_path / "large/model.safetensors")
    weights[NAME][0, 0] = 1e5
    save_file(weights, tmp_path / "large/model.safetensors")
    with pytest.raises(ValueError, match=rf"load_pretrained: every weight .* in torch.float16: {NAME}"):
        load_pretrained(tmp_path / "large", dtype=torch.float16)
    load_pretrained(tmp_path / "large", dtype=torch.bfloat16)


@pytest.mark.parametrize("command", ["caption", "classify", "embed"])
def test_a_command_on_a_ruined_model_prints_one_line_and_no_nan(command, ruined, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = {"caption": [], "classify": ["--classes", "red,blue"], "embed": ["--index", "index"]}[command]
    arguments = [command, str(ruined), files[0], *more]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"grr {command}: load_weights: every weight must be a finite number")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0}])
def test_captions_and_texts_of_a_model_that_computes_nan_are_errors(trained, options):
    model, tokenizer = copy.deepcopy(trained.model), trained.tokenizer
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    with pytest.raises(ValueError, match="generate: the scores of the next token must be numbers, got NaN"):
        generate(model, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tokenizer, **options)
    with pytest.raises(ValueError, match=r"embed_texts: what the model computes must be finite, .* for 'red'"):
        embed_texts(model, tokenizer, ["red"], torch.device("cpu"))


def test_outputs_that_are_not_finite_name_the_first():
    outputs = torch.zeros(3, 4)
    check_finite_outputs("embed", outputs, ["a", "b", "c"])
    outputs[1:, 2] = torch.inf
    with pytest.raises(ValueError, match=r"embed: .* for 'b', the first of 2 in a batch of 3"):
        check_finite_outputs("embed", outputs, ["a", "b", "c"])
