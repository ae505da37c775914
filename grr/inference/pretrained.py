"""Trained models on disk: their descriptions, and how to load them.

A model is described by its builder and the builder's arguments. The description is stored beside the weights: in
`config.json` of a model's folder, and in the progress of every checkpoint.
"""

import hashlib
import inspect
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from grr.checkpoint.adapters import FILE as ADAPTERS
from grr.checkpoint.adapters import apply_adapters, load_adapters
from grr.checkpoint.finite import check_finite_weights
from grr.checkpoint.model_folder import load_model_weights
from grr.checkpoint.step_folders import latest_checkpoint
from grr.checkpoint.training_state import load_checkpoint_weights, read_weights
from grr.components import PAIRING, LoRALinear
from grr.data.images import Crop
from grr.files.digest import sha256
from grr.files.regular import read_regular_file
from grr.inference.captioner import Captioner
from grr.inference.quantization import SCHEMES, Scheme, load_quantized
from grr.models.builders import MODELS, create_model
from grr.models.coca import CoCa
from grr.models.open_clip import OPEN_CLIP_MODELS
from grr.parallel.process_group import default_device, on_rank_0
from grr.tokenizers import load_tokenizer

FORMAT = 1
MAX_JSON = 2**24  # bytes of a description; one of a thousand classes takes 20,000
LARGEST = 2**24  # of any number of a description, and below of those that cost memory
RANGES: dict[str, tuple[float, float]] = {
    "image_size": (1, 4096),
    "patch_size": (1, 4096),
    "context_length": (4, 2**16),
    "vocab_size": (5, LARGEST),
    "num_queries": (1, 2**16),
    "vision_layers": (0, 1000),
    "text_layers": (0, 1000),
    "multimodal_layers": (0, 1000),
    "dim": (1, 2**16),
    "vision_dim": (1, 2**16),
    "num_heads": (1, 2**12),
    "vision_heads": (1, 2**12),
    "pooler_heads": (1, 2**12),
    "vision_ffn_multiplier": (0, 64),
    "text_ffn_multiplier": (0, 64),
    "dropout": (0, 1),
    "logit_bias": (-LARGEST, LARGEST),
}
MOST_VALUES = 100  # of one argument, and characters of a name
MOST_PER_BYTE = 2  # parameters: of 4 bits each

logger = logging.getLogger(__name__)


class Base(NamedTuple):
    """The model that adapters were trained on."""

    source: "Pretrained"
    digest: str  # `weights_digest` of it
    scale: float  # of the updates, alpha / rank


class Pretrained(NamedTuple):
    """Description of a trained model on disk: the folder of its weights, and how to build it."""

    path: Path  # a model's folder, or a checkpoint
    builder: str  # a name of grr.models.builders.MODELS or of grr.models.open_clip.OPEN_CLIP_MODELS
    arguments: dict[str, Any]
    tokenizer: Path
    crop: Crop
    quantization: Scheme | None = None  # how its matrices are stored; None: as numbers
    head: str | None = None  # of a classifier, a name of grr.models.heads.HEADS; None: it is a whole CoCa
    base: Base | None = None  # the model whose weights it changes by adapters; None: it has all of its weights


def load(
    path: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Captioner:
    """Open a trained model to caption, embed and classify images.

        captioner = load("runs/openmoji")

    path: a run's folder, its model/, one of its checkpoints, or a quantised model. device: None means the GPU where
    there is one, else the CPU. A quantised model computes in `dtype` as well.
    Raises FileNotFoundError if there is no model, ValueError if it is damaged, of an unknown builder, or has weights
    that are not finite or too large for `dtype`.
    """
    return load_pretrained(path, device=default_device() if device is None else device, dtype=dtype)


def load_pretrained(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Captioner:
    """Open a trained model on a given device, by default the CPU, as recipes do; see `load`.

        model, tokenizer, image_size, crop = load_pretrained("runs/openmoji")

    The model is in evaluation mode. Raises as `find_pretrained` and `load_weights` do, for a quantised model as
    `load_quantized` does, and ValueError if weights are too large for `dtype`, dtype is not one of floats, or there is
    no such device.
    """
    source = find_pretrained(path)
    device = _checked_device(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"load_pretrained: dtype must be a torch dtype of floats, such as torch.bfloat16, got {dtype=}; give "
            "torch.float32, torch.bfloat16 or torch.float16"
        )
    with torch.device("meta"):
        model = build_pretrained(source)
    if source.quantization is not None:
        load_quantized(source.path, model.to(dtype), source.quantization, device)
    else:
        model.to_empty(device=device)
        load_weights(source, model)
        model.to(dtype)  # checkpoints are read in the precision they were saved in
        if dtype == torch.float16:
            check_finite_weights("load_pretrained", model.state_dict(), f"{source.path} in {dtype}")
    tokenizer = load_tokenizer(source.tokenizer, context_length=source.arguments["context_length"])
    return Captioner(model.eval(), tokenizer, source.arguments["image_size"], source.crop)


def _checked_device(device: torch.device | str) -> torch.device:
    """Returns the device. Raises ValueError for another value, and for a GPU that this machine does not have."""
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"load_pretrained: device must be a torch device, such as 'cuda' or 'cpu', got {device!r} ({why}); leave "
            "device out for the default"
        ) from error
    if checked.type == "cuda" and (checked.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"load_pretrained: device must be one of this machine, got {device!r} and {torch.cuda.device_count()} CUDA "
            "GPUs are available; leave device out for the default"
        )
    return checked


def fingerprint(trained: Captioner) -> str:
    """Returns a hash of all that determines a model's outputs: weights, vocabulary, image size and crop.

    It is equal for a run, its model/ and a copy, in float32 and in bfloat16: weights are rounded to bfloat16 first.
    """
    model, tokenizer, image_size, crop = trained
    digest = hashlib.blake2b(
        f"{tokenizer.fingerprint} {tokenizer.context_length} {image_size} {crop}".encode(), digest_size=16
    )
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.bfloat16().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_digest(source: Pretrained) -> str:
    """Returns a hash of a model's weight files, builder and arguments. Called by all ranks alike."""

    def digest() -> str:
        checkpoint = (source.path / "progress.json").is_file()  # whose manifest holds the hashes of its other files
        file = ADAPTERS if source.base else "model.safetensors"
        weights = sha256(source.path / ("manifest.json" if checkpoint else file))
        if source.base is not None:
            weights += source.base.digest
        return hashlib.sha256(repr((source.builder, sorted(source.arguments.items()), weights)).encode()).hexdigest()

    return on_rank_0(digest)


def find_pretrained(path: str | Path, *, adapted: bool = True) -> Pretrained:
    """Read the description of a model: from a model's folder, a checkpoint, or a run's folder.

    Of a run's folder, it is the finished model, or else the newest whole checkpoint. Where adapters are kept beside
    another model, the description of that one is read as well; adapted: whether such a folder is allowed.
    Raises FileNotFoundError if there is no model, ValueError if path is not a folder's, or if the description is
    damaged, of a newer version, of another rotary pairing, names an unknown builder or has arguments that no model has,
    or if its model has more parameters than the weights beside it can hold. Nothing of that size is allocated before.
    """
    if not isinstance(path, str | os.PathLike) or os.fspath(path) == "":
        raise ValueError(
            f"find_pretrained: path must be a folder's, got {path!r}; give the folder of a run, its model/, or one of "
            "its checkpoints/step_N"
        )
    path = Path(path)
    if path.is_file():
        raise ValueError(
            f"find_pretrained: path must be a folder's, got the file {path}; give the folder that holds it, "
            f"{path.parent}"
        )
    if (path / "config.json").is_file():
        file = path / "config.json"
        return _described(path, file, _json(file), path / "tokenizer.model", adapted=adapted)
    if (path / "progress.json").is_file():
        run = path.resolve().parent.parent  # runs/mine/checkpoints/step_100
        progress = _json(path / "progress.json")
        described = progress.get("model") if isinstance(progress, dict) else None
        return _described(path, path / "progress.json", described, run / "tokenizer.model", adapted=adapted)
    if (path / "model" / "config.json").is_file():
        return find_pretrained(path / "model", adapted=adapted)
    checkpoint = latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(
            f"find_pretrained: {path} holds no model; give the folder of a run that was trained, its model/, or one of "
            "its checkpoints/step_N"
        )
    return find_pretrained(checkpoint, adapted=adapted)


def build_pretrained(source: Pretrained, **changes: Any) -> CoCa:
    """Build the model of a description, without its weights; `changes` replace arguments: dropout=0.1."""
    return create_model(source.builder, **source.arguments | changes)


def load_weights(source: Pretrained, model: nn.Module) -> None:
    """Load the weights of a description into a model, plain or sharded. Called by all ranks alike.

    Adapters that were kept beside a model are added to its weights; adapters that the model here has are set to 0.
    Raises ValueError if they are quantized, because such a model cannot be trained (open it with `load_pretrained`); if
    they are a classifier's, which has only some parts of a CoCa, and the model is a CoCa; if one is not finite; and if
    the model that adapters were trained on has changed.
    """
    if source.head is not None and isinstance(model, CoCa):
        raise ValueError(
            f"load_weights: {source.path} is a classifier, {source.head}, without all parts of a CoCa; give the model "
            "that it was trained from, or open it with grr.inference.classifiers.load_classifier"
        )
    if source.quantization is not None:
        raise ValueError(
            f"load_weights: {source.path} is quantised, by {source.quantization}, and cannot be trained "
            "on; give the model it was made from"
        )
    if source.base is not None:
        _load_adapted(source, source.base, model)
    elif (source.path / "progress.json").is_file():
        load_checkpoint_weights(source.path, model)
    else:
        load_model_weights(source.path, model)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):  # so that the model computes what the weights say
            nn.init.zeros_(layer.lora_b)
    check_finite_weights("load_weights", model.state_dict(), str(source.path))


def _load_adapted(source: Pretrained, base: Base, model: nn.Module) -> None:
    """Load the weights of the base, once it was found to be the same, and add what was trained on it."""
    if (digest := weights_digest(base.source)) != base.digest:
        raise ValueError(
            f"load_weights: the adapters in {source.path} were trained on other weights than those in "
            f"{base.source.path}, got sha256 {digest[:12]} for {base.digest[:12]}; put the base there again"
        )
    load_weights(base.source, model)
    checkpoint = (source.path / "progress.json").is_file()
    tensors = read_weights(source.path) if checkpoint else load_adapters(source.path)
    apply_adapters(model, tensors, scale=base.scale, where=str(source.path))


def tell_of_other_crop(source: Pretrained, crop: Crop) -> None:
    """Log that a run crops images in another way than the training of its pre-trained model, if it does."""
    if crop != source.crop:
        logger.info(
            "%s was trained with another crop of its images; set loader.crop=%s to keep it", source.path, source.crop
        )


def describe(builder: str, arguments: dict[str, Any], crop: Crop, quantization: Scheme | None = None) -> dict[str, Any]:
    """Returns the description of a model as JSON values, to be saved beside the weights for `find_pretrained`.

    Patch dropout is left out: it belongs to a pre-training, and a fine-tuning of its model reads all patches.
    """
    description = {
        "format": FORMAT,
        "builder": builder,
        "arguments": {key: value for key, value in arguments.items() if key != "patch_dropout"},
        "rotary_pairing": PAIRING,
        "crop": crop,
    }
    return description if quantization is None else description | {"quantization": quantization}


def describe_adapters(description: dict[str, Any], source: Pretrained, *, rank: int, alpha: float) -> dict[str, Any]:
    """Returns the description of a model whose weights are those of `source` and adapters, saved apart from them.

    Called by all ranks alike. Raises ValueError if `source` has its own weights apart from its adapters as well.
    """
    if source.base is not None:
        raise ValueError(
            f"describe_adapters: adapters must be trained on a model with all of its weights, got {source.path}, which "
            f"has adapters beside {source.base.source.path}; train on the model/ of a run with run.merge_adapters=true"
        )
    base = {"base": str(source.path.absolute()), "digest": weights_digest(source), "rank": rank, "alpha": alpha}
    return description | {"adapter": base}


def _base(file: Path, adapter: Any) -> Base | None:
    """Returns the model that adapters belong to, from a description; None for a model without adapters beside it."""
    if adapter is None:
        return None
    try:
        path, digest, rank, alpha = Path(adapter["base"]), adapter["digest"], adapter["rank"], adapter["alpha"]
        scale = float(alpha) / int(rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"find_pretrained: {file} does not describe adapters ({error!r}); was it edited?") from error
    if not isinstance(digest, str) or not math.isfinite(scale):
        raise ValueError(f"find_pretrained: {file} does not describe adapters, got {str(adapter)[:80]}; was it edited?")
    try:
        return Base(find_pretrained(path, adapted=False), digest, scale)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"find_pretrained: {file} holds adapters of the model {path}, which cannot be opened: {error}; put it "
            f"there, or write its folder as adapter.base into {file.name}"
        ) from error


def _described(path: Path, file: Path, description: Any, tokenizer: Path, *, adapted: bool) -> Pretrained:
    try:
        made_with, builder, arguments = description["format"], description["builder"], dict(description["arguments"])
        pairing, crop = description["rotary_pairing"], description["crop"]
        quantization, head, adapter = (description.get(key) for key in ("quantization", "head", "adapter"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"find_pretrained: {file} does not describe a model ({error!r}); was it edited?") from error
    if made_with != FORMAT:
        raise ValueError(f"find_pretrained: {file} has format {made_with!r}, this version reads {FORMAT}; upgrade GRR")
    if not isinstance(builder, str) or builder not in MODELS | OPEN_CLIP_MODELS:
        raise ValueError(
            f"find_pretrained: {file} names the builder {builder!r}, which grr.builders.MODELS lacks; import the "
            "module that adds it first: grr --import MODULE, or import it in your program"
        )
    if pairing != PAIRING:
        raise ValueError(
            f"find_pretrained: {file} was trained with the rotary pairing {pairing!r}, this version turns "
            f"{PAIRING!r}; permute the channels of its heads"
        )
    if crop not in get_args(Crop):
        raise ValueError(f"find_pretrained: {file}: crop must be one of {', '.join(get_args(Crop))}, got {crop!r}")
    if quantization is not None and quantization not in SCHEMES:
        raise ValueError(
            f"find_pretrained: {file}: quantization must be one of {', '.join(SCHEMES)}, got "
            f"{quantization!r}; upgrade GRR"
        )
    if head is not None and not isinstance(head, str):
        raise ValueError(f"find_pretrained: {file}: head must be a name, got {head!r}; was it edited?")
    if adapter is not None and not adapted:
        raise ValueError(f"find_pretrained: {file} describes adapters, not a model with all of its weights")
    base = _base(file, adapter)
    source = Pretrained(path, builder, _renamed(builder, arguments), tokenizer, crop, quantization, head, base)
    _check_arguments(file, source)
    _check_size(file, source)
    return source


def _renamed(builder: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments by today's names: in version 0.1, `context` was context_length and num_queries."""
    parameters = inspect.signature((MODELS | OPEN_CLIP_MODELS)[builder]).parameters
    if "context" not in arguments or "context" in parameters:
        return arguments
    arguments = {"context_length": arguments["context"]} | arguments
    if "num_queries" in parameters:
        arguments = {"num_queries": arguments["context"]} | arguments
    del arguments["context"]
    return arguments


def _check_arguments(file: Path, source: Pretrained) -> None:
    """Raise ValueError for arguments of a wrong name, type or range, before anything is built."""
    parameters = inspect.signature((MODELS | OPEN_CLIP_MODELS)[source.builder]).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # of a builder of the user
    for name, given in source.arguments.items():
        if name not in parameters and not any_name:
            raise ValueError(
                f"find_pretrained: {file} gives {source.builder} the argument {name!r}, which it does not "
                "have; upgrade GRR, or was it edited?"
            )
        lowest, highest = RANGES.get(name, (-LARGEST, LARGEST))
        values = given if isinstance(given, list) else [given]
        for value in values[:MOST_VALUES]:
            number = isinstance(value, int | float)
            if not number and not (value is None or (isinstance(value, str) and len(value) < MOST_VALUES)):
                raise ValueError(
                    f"find_pretrained: {file}: {name} must be a number or a short name, got a "
                    f"{type(value).__name__}; was it edited?"
                )
            if number and not lowest <= value <= highest:  # NaN is not less
                raise ValueError(
                    f"find_pretrained: {file}: {name} must be from {lowest:,} to {highest:,}, got "
                    f"{str(value)[:40]}; was it edited?"
                )
        if len(values) > MOST_VALUES:
            raise ValueError(
                f"find_pretrained: {file}: {name} must have at most {MOST_VALUES} values, got "
                f"{len(values):,}; was it edited?"
            )
    for name in ("image_size", "context_length"):
        if type(source.arguments.get(name)) is not int:
            raise ValueError(
                f"find_pretrained: {file}: {name} must be a whole number, got "
                f"{source.arguments.get(name)!r}; was it edited?"
            )


def _check_size(file: Path, source: Pretrained) -> None:
    """Raise ValueError if the model cannot be built, or has more parameters than the weight files can hold."""
    try:
        with torch.device("meta"):
            model = build_pretrained(source)
    except Exception as error:  # whatever a builder raises at arguments that do not fit one another
        why = str(error).partition("\n")[0]
        raise ValueError(f"find_pretrained: {file} does not describe a model: {why}; was it edited?") from error
    parameters = sum(p.numel() for p in model.parameters())
    folder = source.path if source.base is None else source.base.source.path
    size = sum(
        weights.stat().st_size for pattern in ("model.safetensors", "*.distcp") for weights in folder.glob(pattern)
    )
    if size and parameters > MOST_PER_BYTE * size:
        raise ValueError(
            f"find_pretrained: {file} describes a model of {parameters:,} parameters, more than the {size:,} bytes of "
            "weights beside it can hold; was it edited, or are the weights another model's?"
        )


def _json(file: Path) -> Any:
    try:
        return json.loads(read_regular_file(file, MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"find_pretrained: {file} is not JSON ({error}); copy the folder again") from error
