"""Trained models on disk and on the Hugging Face hub: their descriptions, and how to load them.

A model is described by its builder and the builder's arguments. The description is stored beside the weights: in
`config.json` of a model's folder, and in the progress of every checkpoint. Of models in open_clip's layouts, it is made
from open_clip's own description.
"""

import hashlib
import inspect
import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from grr.checkpoint.finite import check_finite_weights
from grr.checkpoint.model_folder import fill_model, load_model_weights
from grr.checkpoint.step_folders import latest_checkpoint
from grr.checkpoint.training_state import load_checkpoint_weights
from grr.components import PAIRING
from grr.data.images import Crop
from grr.files.digest import sha256
from grr.files.regular import read_regular_file
from grr.inference.captioner import Captioner
from grr.inference.hub import is_hub_name, open_repository
from grr.inference.open_clip import (
    CONFIGS,
    MERGES,
    OpenClipFiles,
    OpenClipWeights,
    clip_merges,
    config_of,
    open_clip_files,
    read_config,
    weights_name,
)
from grr.inference.quantization import SCHEMES, Scheme, load_quantized
from grr.inference.zoo import zoo
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


class Pretrained(NamedTuple):
    """Description of a trained model on disk: the folder of its weights, and how to build it.

    In a text it is the path, or the repository on the hub, of which the folder is the copy in the cache.
    """

    path: Path  # a model's folder, or a checkpoint
    builder: str  # a name of grr.models.builders.MODELS or of grr.models.open_clip.OPEN_CLIP_MODELS
    arguments: dict[str, Any]
    tokenizer: Path
    crop: Crop
    quantization: Scheme | None = None  # how its matrices are stored; None: as numbers
    head: str | None = None  # of a classifier, a name of grr.models.heads.HEADS; None: it is a whole CoCa
    open_clip: OpenClipWeights | None = None  # weights that are converted in memory; None: they are this library's
    repository: str | None = None  # hf-hub:owner/name@commit, if the folder was downloaded

    def __str__(self) -> str:
        return self.repository or str(self.path)


def load(
    path: str | Path | Pretrained, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Captioner:
    """Open a trained model to caption, embed and classify images.

        captioner = load("runs/openmoji")
        captioner = load("hf-hub:laion/CoCa-ViT-B-32-laion2B-s13B-b90k")

    path: a run's folder, its model/, one of its checkpoints, a quantised model, a folder in open_clip's layout, or a
    repository of one of these on the Hugging Face hub, hf-hub:owner/name or hf-hub:owner/name@revision, which its own
    client downloads (see `grr.inference.hub.open_repository`); `grr models` lists some. device: None means the GPU
    where there is one, else the CPU. A quantised model computes in `dtype` as well.
    Raises FileNotFoundError if there is no model, ValueError if it is damaged, of an unknown builder, or has weights
    that are not finite or too large for `dtype`; for the hub also as `open_repository` does.
    """
    return load_pretrained(path, device=default_device() if device is None else device, dtype=dtype)


def load_pretrained(
    path: str | Path | Pretrained, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Captioner:
    """Open a trained model on a given device, by default the CPU, as recipes do; see `load`.

        model, tokenizer, image_size, crop = load_pretrained("runs/openmoji")

    path: see `load`, or what `find_pretrained` returned. The model is in evaluation mode. Raises as `find_pretrained`
    and `load_weights` do, for a quantised model as `load_quantized` does, and ValueError if weights are too large for
    `dtype`, dtype is not one of floats, or there is no such device.
    """
    source = path if isinstance(path, Pretrained) else find_pretrained(path)
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
            check_finite_weights("load_pretrained", model.state_dict(), f"{source} in {dtype}")
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
        if source.open_clip is not None:
            weights = f"{sha256(source.open_clip.file)} {source.open_clip.mean} {source.open_clip.std}"
        else:
            weights = sha256(source.path / ("manifest.json" if checkpoint else "model.safetensors"))
        return hashlib.sha256(repr((source.builder, sorted(source.arguments.items()), weights)).encode()).hexdigest()

    return on_rank_0(digest)


def find_pretrained(path: str | Path) -> Pretrained:
    """Read the description of a model: from a model's folder, a checkpoint, a run's folder, or the hub (see `load`).

    Of a run's folder, it is the finished model, or else the newest whole checkpoint. Of the hub, everything that the
    model needs is downloaded and verified.

    Raises FileNotFoundError if there is no model, ValueError if path is not a folder's, or if the description is
    damaged, of a newer version, of another rotary pairing, names an unknown builder or has arguments that no model has,
    or if its model has more parameters than the weights beside it can hold. Nothing of that size is allocated before.
    """
    if not isinstance(path, str | os.PathLike) or os.fspath(path) == "":
        raise ValueError(
            f"find_pretrained: path must be a folder's, got {path!r}; give the folder of a run, its model/, or one of "
            "its checkpoints/step_N"
        )
    if is_hub_name(path):
        return _from_hub(os.fspath(path))
    path = Path(path)
    if path.is_file():
        raise ValueError(
            f"find_pretrained: path must be a folder's, got the file {path}; give the folder that holds it, "
            f"{path.parent}"
        )
    if (published := open_clip_files(path)) is not None:
        return _published(path, published)
    if (path / "config.json").is_file():
        return _described(path, path / "config.json", _json(path / "config.json"), path / "tokenizer.model")
    if (path / "progress.json").is_file():
        run = path.resolve().parent.parent  # runs/mine/checkpoints/step_100
        progress = _json(path / "progress.json")
        described = progress.get("model") if isinstance(progress, dict) else None
        return _described(path, path / "progress.json", described, run / "tokenizer.model")
    if (path / "model" / "config.json").is_file():
        return find_pretrained(path / "model")
    checkpoint = latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(
            f"find_pretrained: {path} holds no model; give the folder of a run that was trained, its model/, or one of "
            "its checkpoints/step_N"
        )
    return find_pretrained(checkpoint)


def build_pretrained(source: Pretrained, **changes: Any) -> CoCa:
    """Build the model of a description, without its weights; `changes` replace arguments: dropout=0.1."""
    return create_model(source.builder, **source.arguments | changes)


def load_weights(source: Pretrained, model: nn.Module) -> None:
    """Load the weights of a description into a model, plain or sharded. Called by all ranks alike.

    Raises ValueError if they are quantized, because such a model cannot be trained (open it with `load_pretrained`); if
    they are a classifier's, which has only some parts of a CoCa, and the model is a CoCa; and if one is not finite.
    """
    if source.head is not None and isinstance(model, CoCa):
        raise ValueError(
            f"load_weights: {source} is a classifier, {source.head}, without all parts of a CoCa; give the model "
            "that it was trained from, or open it with grr.inference.classifiers.load_classifier"
        )
    if source.quantization is not None:
        raise ValueError(
            f"load_weights: {source} is quantised, by {source.quantization}, and cannot be trained "
            "on; give the model it was made from"
        )
    if source.open_clip is not None:
        with torch.device("meta"):
            empty = build_pretrained(source)
        fill_model(model, partial(source.open_clip.state_for, empty))
    elif (source.path / "progress.json").is_file():
        load_checkpoint_weights(source.path, model)
    else:
        load_model_weights(source.path, model)
    check_finite_weights("load_weights", model.state_dict(), str(source))


def tell_of_other_crop(source: Pretrained, crop: Crop) -> None:
    """Log that a run crops images in another way than the training of its pre-trained model, if it does."""
    if crop != source.crop:
        logger.info(
            "%s was trained with another crop of its images; set loader.crop=%s to keep it", source, source.crop
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


def _from_hub(name: str) -> Pretrained:
    """Download what a model needs from its repository, in this library's layout or one of open_clip's."""
    repository = open_repository(name)
    configs = [file for file in CONFIGS if file in repository.files]
    folder = repository.fetch(*configs)
    weights = weights_name(repository.files)
    config = config_of(folder / file for file in configs)
    if config is not None:
        read_config(*config)  # raises ValueError before the weights are downloaded
    if weights is not None and (config is not None or repository.name in zoo()):
        folder = repository.fetch(weights, *(file for file in MERGES if file in repository.files))
        published = open_clip_files(folder, repository.name)
        assert published is not None
        return _published(folder, published)._replace(repository=str(repository))
    own = ("config.json", "model.safetensors", "tokenizer.model")
    description = _json(folder / own[0]) if own[0] in configs else None
    if not repository.files.issuperset(own) or not isinstance(description, dict) or "builder" not in description:
        files = ", ".join(sorted(repository.files)) or "none"
        raise ValueError(
            f"find_pretrained: {repository} must hold a model of this library, with the files {', '.join(own)}, or a "
            f"CoCa of open_clip, with {CONFIGS[0]} and weights, got the files {files[:200]}; give another repository"
        )
    folder = repository.fetch(*own)
    return find_pretrained(folder)._replace(repository=str(repository))


def _published(path: Path, files: OpenClipFiles) -> Pretrained:
    """Returns the description of a model in one of open_clip's layouts."""
    description = describe(files.builder, files.arguments, files.crop)
    source = _described(path, files.source, description, clip_merges(path), files.weights)
    tokenizer = load_tokenizer(source.tokenizer, context_length=files.arguments["context_length"])
    if tokenizer.vocab_size != files.arguments["vocab_size"]:
        raise ValueError(
            f"find_pretrained: {files.source} must have the text_cfg.vocab_size of its vocabulary, "
            f"{tokenizer.vocab_size - 1} in {source.tokenizer}, got {files.arguments['vocab_size'] - 1}; put the "
            f"{MERGES[0]} of the training beside the weights"
        )
    return source


def _described(
    path: Path, file: Path, description: Any, tokenizer: Path, open_clip: OpenClipWeights | None = None
) -> Pretrained:
    try:
        made_with, builder, arguments = description["format"], description["builder"], dict(description["arguments"])
        pairing, crop = description["rotary_pairing"], description["crop"]
        quantization, head = description.get("quantization"), description.get("head")
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
    source = Pretrained(path, builder, _renamed(builder, arguments), tokenizer, crop, quantization, head, open_clip)
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
    own = [weights for pattern in ("model.safetensors", "*.distcp") for weights in source.path.glob(pattern)]
    size = sum(weights.stat().st_size for weights in ([source.open_clip.file] if source.open_clip else own))
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
