"""mypy reports wrong calls of builders and accepts right ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason='pip install "grr-coca[dev]"')
IMPORTS = """\
from torch import Tensor, nn

import grr
from grr.models.builders import (
    baseline_coca,
    baseline_vit,
    coca,
    grr_coca,
    grr_coca_2b,
    grr_coca_large,
    grr_coca_small,
    grr_coca_tiny,
    grr_vit,
    original_coca,
    original_coca_2b,
    preset,
    text_decoder,
    vision_transformer,
)
from grr.models.coca import CoCa, TextDecoder, VisionTransformer
from grr.models.open_clip import (
    open_clip_coca,
    open_clip_coca2_moderntext_vit_b_32,
    open_clip_coca2_vit_b_32,
    open_clip_coca_vit_b_32,
    open_clip_coca_vit_l_14,
)
"""
COCAS = [
    "coca",
    "grr_coca",
    "baseline_coca",
    "original_coca",
    "grr_coca_tiny",
    "grr_coca_small",
    "grr_coca_large",
    "grr_coca_2b",
    "original_coca_2b",
]
OPEN_CLIPS = [
    "open_clip_coca",
    "open_clip_coca_vit_b_32",
    "open_clip_coca_vit_l_14",
    "open_clip_coca2_vit_b_32",
    "open_clip_coca2_moderntext_vit_b_32",
]
VITS = ["vision_transformer", "grr_vit", "baseline_vit"]
WRONG = {
    **{f"{name}(imagesize=3)": ['"imagesize"', '"image_size"'] for name in (*COCAS, *VITS, *OPEN_CLIPS)},
    **{f'{name}(vision_norm="batchnorm")': ['"vision_norm"', "'batchnorm'", "'rmsnorm'"] for name in COCAS},
    **{f'{name}(dim="wide")': ['"dim"', '"str"', '"int"'] for name in (*COCAS, *VITS, *OPEN_CLIPS)},
    **{f'{name}(position="sine")': ['"position"', "'sine'", "'sinusoidal'"] for name in (*VITS, "text_decoder")},
    'open_clip_coca(text_arch="llama")': ['"text_arch"', "'llama'", "'modern'"],
    'grr_coca(text_position="rope_2d")': ['"text_position"', "'rope_2d'"],
    "grr_coca_tiny(dropout=None)": ['"dropout"', "None"],
    "grr_coca_tiny(64)": ["positional"],
    "text_decoder(image_size=32)": ['"image_size"'],
    "grr.grr_coca(imagesize=3)": ['"imagesize"', '"image_size"'],
    'grr.grr_coca(dim="wide")': ['"dim"', '"str"', '"int"'],
    "grr.load(3)": ['"load"', '"int"', '"str | Path | Pretrained"'],
    "grr.no_such_name": ['"no_such_name"'],
    "vit: VisionTransformer = grr_coca()": ['"CoCa"', '"VisionTransformer"'],
    'preset(coca, "mine", "Mine.", dims=32)': ['"dims"'],
    'preset(coca, "mine", "Mine.", dim="wide")': ['"dim"', '"str"'],
    'preset(grr_coca_tiny, "mine", "Mine.", dim=32)(dims=8)': ['"dims"'],
}
RIGHT = [
    *(f"{name}_model: CoCa = {name}(dim=64, num_heads=2, dropout=0.1)" for name in (*COCAS, *OPEN_CLIPS)),
    *(f"{name}_model: VisionTransformer = {name}(dim=64, num_heads=2, dropout=0.1)" for name in VITS),
    "decoder: TextDecoder = text_decoder(vocab_size=512, position='learned')",
    "ablation = grr_coca(vision_norm='layernorm', vision_position='rope_2d', vision_ffn_multiplier=None)",
    "embeddings: Tensor = grr_coca_tiny().encode_image(Tensor())",
    "mine = preset(grr_coca_tiny, 'mine', 'Mine.', dim=32)",
    "my_model: CoCa = mine(dim=16, vision_norm='layernorm')",
    "module: nn.Module = grr_vit()",
    "captions: list[str] = grr.load('runs/openmoji').caption('photo.jpg')",
    "mixed: Tensor = grr.load('runs/openmoji').embed_images(['photo.jpg', Tensor(), b''])",
    "loss: Tensor = grr.contrastive_loss(Tensor(), Tensor())",
    "by_name: grr.CoCa = grr.create_model('grr_coca', vision_position='rope_2d')",
    "pairs: grr.Pairs = grr.Pairs.from_dataset([{'image': 'a.jpg', 'text': 'a'}], image='image', caption='text')",
]


@pytest.fixture(scope="module")
def errors(request, tmp_path_factory) -> dict[str, list[str]]:
    """Returns mypy's errors for each line of two files, checked as a user of the package does."""
    folder = tmp_path_factory.mktemp("calls")
    (folder / "wrong.py").write_text(IMPORTS + "\n".join(WRONG) + "\n")
    (folder / "right.py").write_text(IMPORTS + "\n".join(RIGHT) + "\n")
    words = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--show-absolute-path",
        "wrong.py",
        "right.py",
        "--cache-dir",
        str(request.config.cache.mkdir("mypy")),
    ]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    errors: dict[str, list[str]] = {}
    for file, number, message in re.findall(r"^(.+?):(\d+): error: (.+)$", done.stdout, re.MULTILINE):
        line = Path(file).read_text().splitlines()[int(number) - 1]
        errors.setdefault(line, []).append(message)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("call", WRONG)
def test_mypy_names_the_mistake_in_a_wrong_call_of_a_builder(errors, call):
    messages = " ".join(errors.get(call, []))
    assert all(part in messages for part in WRONG[call]), messages


@pytest.mark.slow
def test_mypy_accepts_right_calls_of_builders(errors):
    assert {line: messages for line, messages in errors.items() if line not in WRONG} == {}
