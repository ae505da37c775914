"""Folders of tiny pre-trained vision encoders, of random weights, as transformers and timm save them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 32
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FED = {**TINY, "intermediate_size": 48}
PIXELS = {"image_size": SIZE, "patch_size": 8}
PROCESSOR = {
    "do_center_crop": False,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.45, 0.4],
    "image_std": [0.25, 0.2, 0.3],
    "resample": 3,
    "size": {"height": SIZE, "width": SIZE},
}
FAMILIES = ("dinov2", "dinov3_vit", "siglip", "clip", "vit", "convnext", "resnet", "swin")


def family(name: str) -> nn.Module:
    """Returns a tiny model of transformers, in evaluation mode; every parameter is random, scales too."""
    from transformers import AutoConfig, AutoModel

    text = {**FED, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    sizes: Mapping[str, Mapping[str, Any]] = {
        "dinov2": {**TINY, "image_size": SIZE, "patch_size": 8},
        "dinov3_vit": {**FED, **PIXELS, "num_register_tokens": 2},
        "siglip": {"text_config": {**text, "projection_size": 32}, "vision_config": {**FED, **PIXELS}},
        "clip": {"text_config": text, "vision_config": {**FED, **PIXELS}},
        "vit": {**FED, **PIXELS},
        "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": SIZE},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "swin": {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], **PIXELS, "patch_size": 4, "window_size": 4},
        "bert": {**FED, "vocab_size": 50},
    }
    torch.manual_seed(0)
    return scrambled(AutoModel.from_config(AutoConfig.for_model(name, **sizes[name])))


def scrambled(model: nn.Module) -> nn.Module:
    """Returns a model with other values in every parameter and in the statistics of batch norms."""
    with torch.no_grad():
        for value in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith(("_mean", "_var")))):
            value.add_(0.05 * torch.rand_like(value))
    return model.eval()


def saved(name: str, folder: Path) -> nn.Module:
    """Write a model of `family` and its image processor to a folder, and return it."""
    model = family(name)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Returns what transformers itself computes: [b, p, d], or [b, d, rows, columns] of a convolutional model."""
    return getattr(model, "vision_model", model)(pixel_values=images).last_hidden_state
