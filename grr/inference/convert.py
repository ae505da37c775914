"""Conversion of checkpoints of open_clip's contrastive captioners to the models in `grr.models.open_clip`."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from grr.checkpoint.finite import check_finite_weights
from grr.data.images import IMAGENET_MEAN, IMAGENET_STD
from grr.files.damage import damage
from grr.inference.open_clip_names import sources_of
from grr.models.coca import CoCa

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], over the images that CLIP was trained on
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PARTS = ("visual", "text", "text_decoder", "logit_scale")  # first parts of names in a CoCa of open_clip
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
)  # keys of weights in checkpoints
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # added to names by torch
SIZES: dict[tuple[int, ...], str] = {  # by the shape of visual.conv1.weight
    (768, 3, 32, 32): "open_clip_coca_vit_b_32",
    (1024, 3, 14, 14): "open_clip_coca_vit_l_14",
}
PATCHES = "vision_encoder.patches.projection"
SHOWN = 5  # weights that a message lists
OTHER_KINDS = (  # argument of `open_clip_coca`, the weight of either library that shows it, its value, and the default
    ("cascade_pooler", "visual.attn_pool_contrastive.query", "contrastive_pooler.queries", "true", "false"),
    ("text_arch", "text_decoder.lm_head.weight", "text_decoder.norm.weight", "modern", "clip"),
)


def read_open_clip(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint by open_clip's names, from .safetensors or a file of torch.save.

    Checkpoints of training runs hold them under `state_dict`, with names such as `module._orig_mod.visual.proj`. Names
    are cut to start with one of PARTS, without the words that torch's wrappers add. No code in the file is run. Raises
    FileNotFoundError if the file does not exist, ValueError if it cannot be read (with the likely cause), holds
    anything but tensors and plain values, holds no weights, or if two names become equal.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"read_open_clip: the file {path} does not exist; CoCas of open_clip are open_clip_pytorch_model.bin or "
            "open_clip_model.safetensors in laion/CoCa-ViT-B-32-laion2B-s13B-b90k and its neighbours on the Hugging "
            "Face hub"
        )
    try:
        if path.suffix == ".safetensors":
            read: Any = load_file(path)
        else:
            read = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for damaged files
        raise ValueError(f"read_open_clip: {path} cannot be read: {damage(path)}") from error
    weights = _contained(read)
    if not weights or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise ValueError(
            f"read_open_clip: {path} must hold weights by name, got none; use a checkpoint of open_clip's CoCa"
        )
    names: dict[str, str] = {}  # cut name -> name in the file
    for name in weights:
        plain = _plain_name(name)
        if plain in names:
            raise ValueError(
                f"read_open_clip: {path} has two weights for {plain}: {names[plain]} and {name}; save the "
                "weights of one model in a file, and use that"
            )
        names[plain] = name
    return {plain: weights[name] for plain, name in names.items()}


def _contained(read: Any) -> dict[Any, Any]:
    """Returns the content of the innermost container."""
    while isinstance(read, Mapping):
        inner = next((read[key] for key in CONTAINERS if isinstance(read.get(key), Mapping)), None)
        if inner is None:
            return dict(read)
        read = inner
    return {}


def _plain_name(name: str) -> str:
    words = [word for word in name.split(".") if word not in WRAPPERS]
    first = next((i for i, word in enumerate(words) if word in PARTS), 0)
    return ".".join(words[first:])


def convert_open_clip(
    weights: Mapping[str, Tensor], model: CoCa, *, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> dict[str, Tensor]:
    """Convert open_clip's weights to a float32 state dict of `model`, built by `open_clip_coca` on any device.

    The model then computes the same function as open_clip's with a different layout: CLS is a row of the token
    embedding, of zeros where nothing reads it; images are normalised by ImageNet's constants instead of `mean` and
    `std`, those of the training, so the patch embedding is scaled and has a bias; rotary pairs of channels are those of
    this library; and the bias of similarities is zero. Raises ValueError that lists missing and unexpected weights, and
    those of another shape or not finite.
    """
    wanted = model.state_dict()
    sources = sources_of(model, [name for name in wanted if not name.startswith(PATCHES)]) | {
        f"{PATCHES}.weight": [("visual.conv1.weight", partial(_for_imagenet, std=std))],
        f"{PATCHES}.bias": [("visual.conv1.weight", partial(_bias_for_imagenet, mean=mean, std=std))],
    }
    known = {theirs for parts in sources.values() for theirs, _ in parts}
    faults = [f"{name}: not in the checkpoint" for name in sorted(known - weights.keys())]
    faults += [f"{name}: not in the model" for name in weights if name not in known and not name.endswith("attn_mask")]
    converted: dict[str, Tensor] = {}
    for name, parts in sources.items():
        if not all(theirs in weights for theirs, _ in parts):
            continue
        try:
            converted[name] = torch.cat([change(weights[theirs].float()) for theirs, change in parts])
            fits = converted[name].shape == wanted[name].shape
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            shapes = " + ".join(f"{theirs} {list(weights[theirs].shape)}" for theirs, _ in parts)
            faults.append(f"{shapes}: do not become {name} {list(wanted[name].shape)}")
    used = {theirs: weights[theirs] for theirs in known if theirs in weights}  # without attn_mask, which is infinite
    check_finite_weights("convert_open_clip", used, "the checkpoint")
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        cause = _likely_cause(weights, model)
        shown = "".join(f"\n  {fault}" for fault in faults[:SHOWN] + more)
        raise ValueError(f"convert_open_clip: the checkpoint does not fit the model: {cause}{shown}")
    return converted


def _likely_cause(weights: Mapping[str, Tensor], model: CoCa) -> str:
    """Returns the likely cause of weights that do not fit, from their names and shapes, and the remedy."""
    if not any(name.split(".")[0] in PARTS for name in weights):
        some = ", ".join(list(weights)[:3])
        return (
            f"none of its {len(weights)} names, {some} ..., is of open_clip's CoCa: it is a model of another "
            "architecture; give the checkpoint of a CoCa"
        )
    if not any(name.startswith("text_decoder.") for name in weights):
        return "it has no text_decoder, which writes captions: it is a CLIP; give the checkpoint of a CoCa"
    theirs, own = weights.get("visual.conv1.weight"), model.state_dict()[f"{PATCHES}.weight"]
    if theirs is not None and theirs.shape != own.shape:
        size = SIZES.get(tuple(theirs.shape), "open_clip_coca, with the sizes that it was trained with")
        return (
            f"it is of another size, with patches {list(theirs.shape)} where the model has {list(own.shape)}; set "
            f"model.name={size}"
        )
    for argument, mark, own_mark, value, default in OTHER_KINDS:
        if (mark in weights) != (own_mark in model.state_dict()):
            return f"it is of another architecture; set model.{argument}={value if mark in weights else default}"
    return "some weights are missing, unknown or of another shape; set the sizes that it was trained with"


def _for_imagenet(patches: Tensor, std: Sequence[float]) -> Tensor:
    """Scale weights [d, 3, h, w] for images normalised by ImageNet's deviation instead of `std`."""
    factor = torch.tensor(IMAGENET_STD).double() / torch.tensor(std).double()
    return (patches.double() * factor.view(3, 1, 1)).float()


def _bias_for_imagenet(patches: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute the bias [d] for the difference between ImageNet's mean and `mean`."""
    shift = (torch.tensor(IMAGENET_MEAN).double() - torch.tensor(mean).double()) / torch.tensor(std).double()
    return (patches.double() * shift.view(3, 1, 1)).sum((1, 2, 3)).float()
