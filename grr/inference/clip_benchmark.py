"""Models of this library in CLIP_benchmark's suites: its command with the model type grr.

    pip install clip-benchmark
    python -m grr.inference.clip_benchmark eval --model_type grr --model runs/mine --pretrained "" --dataset cifar10

All its tasks but captioning, which decodes with open_clip's tokenizer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grr.data.image_inputs import read_image
from grr.inference.pretrained import load_pretrained
from grr.models.coca import CoCa

ClipModel = tuple[CoCa, Callable[[Any], Tensor], Callable[[Sequence[str]], Tensor]]


def load_clip(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> ClipModel:
    """Load a model as CLIP_benchmark asks for it: the model with encode_image and encode_text, a function that makes a
    Pillow image a tensor uint8 [3, size, size], and one that makes n texts ids [n, context_length].

    model_name: a path, as of `grr.load`. pretrained and cache_dir are not used. Raises as `grr.load` does.
    """
    captioner = load_pretrained(model_name, device=device)
    transform = partial(read_image, size=captioner.image_size, crop=captioner.crop, where="load_clip")

    def tokenize(texts: Sequence[str]) -> Tensor:
        return torch.tensor([captioner.tokenizer.encode(text) for text in texts])

    return captioner.model, transform, tokenize


def main() -> None:
    """Run CLIP_benchmark's command, with its arguments. Raises ImportError without the package."""
    try:
        from clip_benchmark import cli, models
    except ImportError as error:
        raise ImportError("clip_benchmark: the package is not installed; pip install clip-benchmark") from error
    models.TYPE2FUNC["grr"] = load_clip
    models.MODEL_TYPES.append("grr")
    cli.main()


if __name__ == "__main__":
    main()
