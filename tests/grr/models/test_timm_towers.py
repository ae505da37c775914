"""Towers of timm, as save_for_hf writes them. timm needs the torchvision of this torch, which not every index has."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_towers import SIZES, captioner_of, count_saved, images
from torch import nn
from tower_folders import SIZE, scrambled

import grr
from grr.inference.towers import find_tower
from grr.models.tuning import tune_parts

try:
    import timm
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
    pytest.skip(f'timm cannot be imported ({error}); pip install "grr-coca[timm]"', allow_module_level=True)

MODELS = {
    "vit_tiny_patch16_224": {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "vit_small_patch14_reg4_dinov2": {
        **{"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    },
    "vit_base_patch16_siglip_224": {
        **{"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
    },
    "eva02_tiny_patch14_224": {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext_atto": {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
    "resnet18": {"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": SIZE, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)},
    },
}


def saved(name: str, folder: Path, num_classes: int = 5) -> nn.Module:
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = scrambled(timm.create_model(name, num_classes=num_classes, **MODELS[name]))
    data = {"input_size": (3, SIZE, SIZE), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    save_for_hf(model, folder, model_args=MODELS[name], data_config=data, safe_serialization=True)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_timm(name, tmp_path):
    original = saved(name, tmp_path)
    tower = captioner_of(f"timm/{tmp_path}").vision_encoder.eval()
    with torch.no_grad():
        ours, theirs = tower(images()), original.forward_features(images())
    if theirs.ndim == 4:
        theirs = theirs if name.startswith("swin") else theirs.permute(0, 2, 3, 1)  # [b, rows, columns, d]
        theirs = theirs.reshape(len(theirs), -1, theirs.shape[-1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert ours.shape[2] == tower.dim == original.num_features
    assert theirs.std() > 0.01


def test_a_description_has_timms_statistics_and_nothing_of_its_weights(tmp_path):
    saved("vit_tiny_patch16_224", tmp_path)
    description = find_tower(f"timm/{tmp_path}").description
    assert description["config"]["architecture"] == "vit_tiny_patch16_224"
    assert (description["mean"], description["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert (description["image_size"], description["crop"]) == (SIZE, "clip")


def test_blocks_of_timm_are_found_and_a_frozen_tower_keeps_nothing(tmp_path):
    saved("vit_tiny_patch16_224", tmp_path)
    model = captioner_of(f"timm/{tmp_path}")
    assert [type(block).__name__ for block in model.vision_encoder.blocks] == ["Block", "Block"]
    assert count_saved(model)[0] > 20
    tune_parts(model, frozen=("vision_encoder",))
    assert count_saved(model)[0] == 0


def test_adapters_of_timms_attention(tmp_path):
    saved("vit_tiny_patch16_224", tmp_path)
    model = captioner_of(f"timm/{tmp_path}")
    tune_parts(model, lora=("vision_encoder",), projections=("qkv",))
    assert sum(p.requires_grad for p in model.vision_encoder.parameters()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "hf-hub:someone/model"}, r"must be one of timm.list_models\(\), got 'hf-hub:someone/model'"),
        ({"architecture": "nothing"}, r"must be one of timm.list_models\(\), got 'nothing'; upgrade timm"),
        (
            {"architecture": "resnet18", "model_args": {"checkpoint_path": "x.pth", "pretrained": True}},
            r"model_args of resnet18 must shape the model, got checkpoint_path, pretrained; leave them out",
        ),
    ],
)
def test_a_config_that_loads_other_weights_is_refused(tmp_path, change, message):
    saved("resnet18", tmp_path)
    tower = find_tower(f"timm/{tmp_path}")
    description = tower.description | {"config": change}
    with pytest.raises(ValueError, match=message):
        grr.create_model("tower_coca", **tower.arguments | SIZES | {"vision_config": description})


def test_weights_that_do_not_fit_are_named(tmp_path):
    saved("resnet18", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bn1.running_mean"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the encoder .*:\n  bn1.running_mean: in the model, not in the file"):
        captioner_of(f"timm/{tmp_path}")


def test_a_truncated_file_is_named(tmp_path):
    saved("resnet18", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"load_tower: .*model.safetensors cannot be read: it is truncated: its"):
        find_tower(f"timm/{tmp_path}")
