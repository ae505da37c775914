"""Descriptions of trained models: the name of a builder and its arguments, checked before anything is built.

The description is stored beside the weights: in `config.json` of a model's folder, and in the progress of every
checkpoint. Of models in open_clip's layouts, it is made from open_clip's own description.
"""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from grr.components import PAIRING
from grr.data.images import Crop
from grr.files.regular import read_regular_file
from grr.inference.open_clip import OpenClipWeights
from grr.inference.quantization import SCHEMES, Scheme
from grr.models.builders import create_model, known_builders
from grr.models.coca import CoCa

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
LONGEST = {"vision_encoder": 4096}  # characters: it may be a path
MOST_TOWER = 2**16  # characters of the description of a tower
MOST_PER_BYTE = 2  # parameters: of 4 bits each


class Base(NamedTuple):
    """The model that adapters were trained on."""

    source: "Pretrained"
    digest: str  # `grr.inference.pretrained.weights_digest` of it
    scale: float  # of the updates, alpha / rank


class Pretrained(NamedTuple):
    """Description of a trained model on disk: the folder of its weights, and how to build it.

    In a text it is the path, or the repository on the hub, of which the folder is the copy in the cache.
    """

    path: Path  # a model's folder, or a checkpoint
    builder: str  # a name of grr.models.builders.known_builders
    arguments: dict[str, Any]
    tokenizer: Path
    crop: Crop
    quantization: Scheme | None = None  # how its matrices are stored; None: as numbers
    head: str | None = None  # of a classifier, a name of grr.models.heads.HEADS; None: it is a whole CoCa
    open_clip: OpenClipWeights | None = None  # weights that are converted in memory; None: they are this library's
    base: Base | None = None  # the model whose weights it changes by adapters; None: it has all of its weights
    repository: str | None = None  # hf-hub:owner/name@commit, if the folder was downloaded

    def __str__(self) -> str:
        return self.repository or str(self.path)


def build_pretrained(source: Pretrained, **changes: Any) -> CoCa:
    """Build the model of a description, without its weights; `changes` replace arguments: dropout=0.1."""
    return create_model(source.builder, **source.arguments | changes)


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


def read_description(
    path: Path,
    file: Path,
    description: Any,
    tokenizer: Path,
    *,
    open_clip: OpenClipWeights | None = None,
    base: Base | None = None,
) -> Pretrained:
    """Returns the description of the model in a folder, after all checks. file: what the description was read from.

    Raises ValueError as `find_pretrained` does.
    """
    try:
        made_with, builder, arguments = description["format"], description["builder"], dict(description["arguments"])
        pairing, crop = description["rotary_pairing"], description["crop"]
        quantization, head = description.get("quantization"), description.get("head")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"find_pretrained: {file} does not describe a model ({error!r}); was it edited?") from error
    if made_with != FORMAT:
        raise ValueError(f"find_pretrained: {file} has format {made_with!r}, this version reads {FORMAT}; upgrade GRR")
    if not isinstance(builder, str) or builder not in known_builders():
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
    source = Pretrained(
        path, builder, _renamed(builder, arguments), tokenizer, crop, quantization, head, open_clip, base
    )
    _check_arguments(file, source)
    _check_size(file, source)
    return source


def _renamed(builder: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments by today's names: in version 0.1, `context` was context_length and num_queries."""
    parameters = inspect.signature(known_builders()[builder]).parameters
    if "context" not in arguments or "context" in parameters:
        return arguments
    arguments = {"context_length": arguments["context"]} | arguments
    if "num_queries" in parameters:
        arguments = {"num_queries": arguments["context"]} | arguments
    del arguments["context"]
    return arguments


def _check_arguments(file: Path, source: Pretrained) -> None:
    """Raise ValueError for arguments of a wrong name, type or range, before anything is built."""
    parameters = inspect.signature(known_builders()[source.builder]).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # of a builder of the user
    for name, given in source.arguments.items():
        if name not in parameters and not any_name:
            raise ValueError(
                f"find_pretrained: {file} gives {source.builder} the argument {name!r}, which it does not "
                "have; upgrade GRR, or was it edited?"
            )
        if name == "vision_config":
            _check_tower(file, given)
            continue
        lowest, highest = RANGES.get(name, (-LARGEST, LARGEST))
        values = given if isinstance(given, list) else [given]
        for value in values[:MOST_VALUES]:
            number = isinstance(value, int | float)
            if not number and not (
                value is None or (isinstance(value, str) and len(value) < LONGEST.get(name, MOST_VALUES))
            ):
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


def _check_tower(file: Path, given: Any) -> None:
    """Raise ValueError for a description of a tower that no tower has."""
    keys = {"library": str, "config": dict, "mean": list, "std": list, "image_size": int, "crop": str}
    wrong = not isinstance(given, dict) or not all(isinstance(given.get(key), kind) for key, kind in keys.items())
    if wrong or len(json.dumps(given)) > MOST_TOWER:
        raise ValueError(
            f"find_pretrained: {file}: vision_config must describe a tower by {', '.join(keys)}, got "
            f"{str(given)[:80]}; was it edited?"
        )
    for number in _numbers(given):
        if not -LARGEST <= number <= LARGEST:  # NaN is not less
            raise ValueError(
                f"find_pretrained: {file}: numbers of vision_config must be from {-LARGEST:,} to {LARGEST:,}, got "
                f"{str(number)[:40]}; was it edited?"
            )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def _check_size(file: Path, source: Pretrained) -> None:
    """Raise ValueError if the model cannot be built, or has more parameters than the weight files can hold."""
    try:
        with torch.device("meta"):
            model = build_pretrained(source)
    except ImportError:  # the library of a tower is missing
        raise
    except Exception as error:  # whatever a builder raises at arguments that do not fit one another
        why = str(error).partition("\n")[0]
        raise ValueError(f"find_pretrained: {file} does not describe a model: {why}; was it edited?") from error
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(
        weights.stat().st_size for weights in _weight_files(source if source.base is None else source.base.source)
    )
    if size and parameters > MOST_PER_BYTE * size:
        raise ValueError(
            f"find_pretrained: {file} describes a model of {parameters:,} parameters, more than the {size:,} bytes of "
            "weights beside it can hold; was it edited, or are the weights another model's?"
        )


def _weight_files(source: Pretrained) -> list[Path]:
    if source.open_clip is not None:
        return [source.open_clip.file]
    return [weights for pattern in ("model.safetensors", "*.distcp") for weights in source.path.glob(pattern)]


def read_json(file: Path) -> Any:
    """Returns the content of a JSON file. Raises ValueError, naming it, if it cannot be read."""
    try:
        return json.loads(read_regular_file(file, MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"find_pretrained: {file} is not JSON ({error}); copy the folder again") from error
