"""Exported graphs give what the model gives, for any number of images and tokens, down to whole captions."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from grr.checkpoint.model_folder import save_model
from grr.data.images import FORMATS, load_image, normalize
from grr.export.onnx import description, export_program, graphs, largest_difference, onnx_outputs, save_onnx
from grr.generation.generate import generate
from grr.inference.pretrained import describe, find_pretrained
from grr.models.builders import coca, grr_coca_tiny
from grr.models.open_clip import open_clip_coca
from grr.tokenizers import Tokenizer, train_tokenizer

onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "grr-coca[export]"')
pytest.importorskip("onnxscript", reason='pip install "grr-coca[export]"')
from grr.export import run_onnx  # noqa: E402  # it imports onnxruntime
from grr.export.run_onnx import Captioner  # noqa: E402

WORDS = ["a", "the", "red", "blue", "big", "small", "fox", "bread", "owl", "boat", "hill", "runs", "sits", "on", "near"]
CONTEXT = 16


class Spelled(Tokenizer):
    """Decodes to the ids themselves: "17 4 1"."""

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with decided opinions, its tokenizer, its graphs, and the folder of its ONNX files."""
    folder = tmp_path_factory.mktemp("export")
    train_tokenizer([f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS], folder / "t.model", vocab_size=100)
    tokenizer = Spelled(folder / "t.model", context_length=CONTEXT)
    arguments = {
        "vocab_size": tokenizer.vocab_size,
        "context_length": CONTEXT,
        "image_size": 32,
        "qk_norm": True,
        "vision_layers": 1,
        "text_layers": 1,
    }
    torch.manual_seed(0)
    model = grr_coca_tiny(**arguments).eval()
    with torch.no_grad():
        model.generative_pooler.out.weight *= 5
        for block in model.multimodal_decoder.blocks:
            block.cross_attention.out.weight *= 5
        model.multimodal_decoder.head.weight *= 6
        model.multimodal_decoder.head.bias[tokenizer.eos_id] += 2 * math.log2(tokenizer.vocab_size / 8)
    save_model(folder / "model", model, describe("grr_coca_tiny", arguments, "squash"), folder / "t.model")
    source = find_pretrained(folder / "model")
    parts = graphs(model, 32, CONTEXT)
    for name, graph in parts.items():
        save_onnx(graph, export_program(graph), folder / f"{name}.onnx")
    (folder / "config.json").write_text(json.dumps(description(source, tokenizer, "uint8")))
    shutil.copyfile(folder / "t.model", folder / "tokenizer.model")
    return model, tokenizer, parts, folder


def some_images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


# Laws


@pytest.mark.slow
@settings(max_examples=12)
@given(
    name=st.sampled_from(["image", "text", "step"]),
    batch=st.integers(1, 5),
    tokens=st.integers(3, 12),
    seed=st.integers(0, 99),
)
def test_a_file_computes_the_outputs_of_the_model_for_any_number_of_images_and_tokens(
    exported, name, batch, tokens, seed
):
    _, _, parts, folder = exported
    torch.manual_seed(seed)
    inputs = parts[name].example(batch, tokens)
    outputs = onnx_outputs(folder / f"{name}.onnx", inputs)
    with torch.no_grad():
        expected = parts[name](**inputs)
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    assert largest_difference(parts[name], inputs, outputs) < 1e-4


# Agreement


@pytest.mark.slow
@torch.no_grad()
def test_steps_from_an_empty_cache_have_the_logits_of_the_whole_caption(exported):
    """Whose computation knows no cache."""
    model, tokenizer, _, folder = exported
    images, ids = some_images(3), torch.randint(3, 90, (3, 9))
    ids[:, 0] = tokenizer.bos_id
    captioner = Captioner(folder)
    seen = captioner.encode_images(images.numpy())
    keys = values = np.zeros((3, 3, 2, 0, 32), dtype=np.float32)
    expected = model(images, ids, positions=torch.arange(9)).logits
    for place in range(9):
        inputs = {
            "ids": ids[:, place : place + 1].numpy(),
            "position": np.array([place]),
            "keys": keys,
            "values": values,
            "context_keys": seen["context_keys"],
            "context_values": seen["context_values"],
        }
        logits, keys, values = captioner.step.run(["logits", "next_keys", "next_values"], inputs)
        np.testing.assert_allclose(logits, expected[:, place].numpy(), atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_captions_are_those_of_generate_token_for_token(exported):
    model, tokenizer, _, folder = exported
    captioner, images = Captioner(folder), some_images(12)
    written = []
    for row in captioner.generate(captioner.encode_images(images.numpy())).tolist():
        end = row.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in row else len(row)
        written.append(row[:end])
    expected = [
        [int(i) for i in caption.split() if int(i) != tokenizer.pad_id]
        for caption in generate(model, images, tokenizer)
    ]
    assert written == expected
    assert len(set(map(tuple, written))) >= 4  # it was not one caption all along
    assert len(set(map(len, written))) >= 2


@pytest.mark.slow
def test_captions_equal_those_of_the_tokenizer(exported):
    model, _, _, folder = exported
    captioner, images = Captioner(folder), some_images(5, seed=1)
    plain = Tokenizer(folder / "tokenizer.model", context_length=CONTEXT)
    assert captioner.caption(captioner.encode_images(images.numpy())) == generate(model, images, plain)


@pytest.mark.slow
@torch.no_grad()
def test_embeddings_equal_those_of_the_model(exported):
    model, tokenizer, _, folder = exported
    captioner, images = Captioner(folder), some_images(3)
    embeddings = captioner.encode_images(images.numpy())["image_embeddings"]
    np.testing.assert_allclose(embeddings, model.encode_image(images).numpy(), atol=1e-5)
    sentences = ["a red fox", "the small  owl sits near the bread on the big hill near the boat", "hill", ""]
    ids = torch.tensor([tokenizer.encode(sentence) for sentence in sentences])[:, :CONTEXT]
    np.testing.assert_allclose(captioner.embed_texts(sentences), model.encode_text(ids).numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["squash", "center", "clip"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_preprocessing_equals_that_of_the_library(exported, tmp_path, crop, mode):
    picture = Image.effect_mandelbrot((70, 50), (-2, -1, 1, 1), 50).convert("RGB")
    picture.putalpha(Image.linear_gradient("L").resize((70, 50)))
    picture.convert(mode).save(tmp_path / "picture.png")
    captioner = Captioner(exported[3])
    captioner.config["crop"] = crop
    expected = load_image(tmp_path / "picture.png", size=32, crop=crop)
    assert np.array_equal(captioner.preprocess(tmp_path / "picture.png"), expected.numpy())
    captioner.config["pixels"] = "float32"
    pixels = captioner.preprocess(tmp_path / "picture.png")
    np.testing.assert_allclose(pixels, normalize(expected).numpy(), atol=1e-5)


OPEN_CLIP = {
    "vocab_size": 90,
    "context_length": 16,
    "image_size": 32,
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
OTHERS = {
    "coca": lambda: coca(
        vocab_size=90,
        context_length=16,
        image_size=32,
        patch_size=8,
        dim=32,
        num_heads=2,
        vision_layers=1,
        text_layers=1,
        multimodal_layers=1,
        vision_position="rope_mixed",
        text_norm="layernorm",
        text_feed_forward="mlp",
        text_position="sinusoidal",
        pooler_norm=True,
        tied_embeddings=True,
    ),
    "open_clip_coca": lambda: open_clip_coca(**OPEN_CLIP),
    "moderntext": lambda: open_clip_coca(**OPEN_CLIP, cascade_pooler=True, text_arch="modern"),
}


@pytest.mark.slow
@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_every_family_of_models_can_be_exported(build, tmp_path):
    torch.manual_seed(0)
    for name, graph in graphs(build().eval(), 32, 16, pixels="float32").items():
        program, inputs = export_program(graph), graph.example(3, 4)
        save_onnx(graph, program, tmp_path / f"{name}.onnx")
        torch.export.save(program, tmp_path / f"{name}.pt2")
        opened = torch.export.load(tmp_path / f"{name}.pt2").module()
        assert largest_difference(graph, inputs, onnx_outputs(tmp_path / f"{name}.onnx", inputs)) < 1e-4
        assert largest_difference(graph, inputs, opened(*inputs.values())) < 1e-5


# Use


@pytest.mark.slow
def test_a_program_holds_its_weights_only_and_no_paths_of_this_machine(exported, tmp_path):
    _, _, parts, folder = exported
    program = export_program(parts["text"])
    torch.export.save(program, tmp_path / "text.pt2")
    inputs = parts["text"].example(4, 7)
    outputs = torch.export.load(tmp_path / "text.pt2").module()(*inputs.values())
    assert largest_difference(parts["text"], inputs, outputs) < 1e-5
    own = {f"model.text_decoder.{name}" for name, _ in parts["text"].model.text_decoder.named_parameters()}
    assert program.state_dict.keys() == own
    for file in (tmp_path / "text.pt2", folder / "text.onnx", folder / "step.onnx"):
        assert str(Path(__file__).resolve().parents[3]).encode() not in file.read_bytes()


def test_other_precisions_and_pixels_are_refused():
    with pytest.raises(
        ValueError, match=r"graphs: the model must be in float32 and not quantised, got Tensor of torch.b"
    ):
        graphs(grr_coca_tiny().bfloat16(), 32, 16)
    with pytest.raises(ValueError, match="graphs: pixels must be one of uint8, float32, got 'int8'"):
        graphs(grr_coca_tiny(), 32, 16, pixels="int8")


def test_a_quantised_model_is_refused():
    pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
    from grr.inference.quantization import quantize

    model = grr_coca_tiny().eval()
    quantize(model, "int8_weight_only")
    with pytest.raises(ValueError, match=r"not quantised, got Int8Tensor of torch.float32, Tensor of torch.float32"):
        graphs(model, 32, 16)


@pytest.mark.slow
def test_the_example_does_not_read_clips_vocabulary(exported, tmp_path):
    config = json.loads((exported[3] / "config.json").read_text()) | {"vocabulary": "clip"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Captioner: this example needs a SentencePiece vocabulary, got CLIP's"):
        Captioner(tmp_path)


@pytest.mark.slow
def test_a_missing_onnx_is_named_with_its_remedy(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"ONNX is not installed; pip install \"grr-coca\[export\]\""):
        save_onnx(exported[2]["text"], None, tmp_path / "text.onnx")


@pytest.mark.slow
def test_the_exported_example_opens_only_regular_files_in_the_formats_of_the_library(exported, tmp_path):
    assert run_onnx.FORMATS == FORMATS
    captioner = Captioner(exported[-1])
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe.jpg must be an image file"):
        captioner.preprocess(tmp_path / "pipe.jpg")
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n")
    with pytest.raises(UnidentifiedImageError):
        captioner.preprocess(tmp_path / "a.jpg")
