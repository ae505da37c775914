"""Trained classifiers on disk: the head of a model, its classes, and the parts of a CoCa that a head starts with."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from grr.checkpoint.finite import check_finite_weights
from grr.checkpoint.training_state import read_progress
from grr.data.images import Crop
from grr.inference.pretrained import (
    Pretrained,
    build_pretrained,
    describe,
    find_pretrained,
    load_adapted,
    load_weights,
)
from grr.models.heads import HEADS, Head
from grr.tokenizers import Tokenizer, load_tokenizer


def load_parts(source: Pretrained, head: nn.Module) -> None:
    """Load the parts that a head shares with a trained CoCa, plain or sharded; other parameters are unchanged.

    Called by all ranks alike; each holds all weights of the CoCa in CPU memory for a short time.
    """
    with torch.device("meta"):
        coca = build_pretrained(source)
    coca.to_empty(device="cpu")
    load_weights(source, coca)
    wanted = get_model_state_dict(head)
    parts = {name: value for name, value in coca.state_dict().items() if name in wanted}
    set_model_state_dict(head, parts, options=StateDictOptions(full_state_dict=True, strict=False))


class LoadedClassifier(NamedTuple):
    """A trained classifier, and how to prepare its inputs."""

    model: Head
    classes: list[str]
    tokenizer: Tokenizer
    image_size: int
    crop: Crop


def load_classifier(path: str | Path, *, device: torch.device | str = "cpu") -> LoadedClassifier:
    """Open a trained classifier, in evaluation mode: a run's folder, its model/ or one of its checkpoints.

        model, classes, tokenizer, image_size, crop = load_classifier("runs/vqa")
        ids = torch.tensor([tokenizer.encode("what is on the left")])[:, :-1]
        answer = classes[model(load_image("photo.jpg", size=image_size, crop=crop)[None], ids).argmax()]

    Raises as `find_pretrained` does, and ValueError if the model is not a classifier.
    """
    source = find_pretrained(path)
    file = source.path / "config.json"
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else read_progress(source.path)["model"]
    if "head" not in saved:
        raise ValueError(
            f"load_classifier: {source.path} is a model without a head; train one on it with "
            "recipes/finetune_classifier.py, or open it with grr.inference.pretrained.load_pretrained"
        )
    head, classes = saved["head"], saved.get("classes")
    if head not in HEADS or not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(
            f"load_classifier: {source.path} must name a head, one of {', '.join(HEADS)}, and its classes "
            f"by texts, got {head!r} and {str(classes)[:80]}; was its description edited?"
        )
    with torch.device("meta"):
        model = HEADS[head](build_pretrained(source), len(classes))
    model.to_empty(device=device)
    if source.base is None:
        load_weights(source, model)
    else:  # a checkpoint of a run that trains adapters on the parts of a CoCa
        load_adapted(source, source.base, model, load_parts)
    check_finite_weights("load_classifier", model.state_dict(), str(source))
    tokenizer = load_tokenizer(source.tokenizer, context_length=source.arguments["context_length"])
    return LoadedClassifier(model.eval(), saved["classes"], tokenizer, source.arguments["image_size"], source.crop)


def describe_classifier(
    builder: str, arguments: dict[str, Any], crop: Crop, head: str, classes: list[str]
) -> dict[str, Any]:
    """What `load_classifier` reads: as JSON, to be saved beside the weights."""
    return {**describe(builder, arguments, crop), "head": head, "classes": classes}
