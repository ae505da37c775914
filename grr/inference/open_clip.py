"""Models in the layouts that open_clip's users publish: a JSON file of the architecture, and a file of weights.

open_clip_config.json holds the architecture, or it and the preprocessing as `model_cfg` and `preprocess_cfg`; some
repositories have the architecture alone, as config.json, or no JSON file. Weights are open_clip_model.safetensors,
open_clip_pytorch_model.bin, or the only .pt. The vocabulary is CLIP's, which most repositories do not hold.
"""

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grr.data.images import Crop
from grr.files.regular import read_regular_file
from grr.inference.convert import CLIP_MEAN, CLIP_STD, convert_open_clip, read_open_clip
from grr.inference.hub import open_repository
from grr.inference.zoo import zoo
from grr.models.coca import CoCa
from grr.models.open_clip import OPEN_CLIP_MODELS
from grr.models.open_clip_config import model_arguments
from grr.tokenizers import ClipTokenizer, installed_merges
from grr.tokenizers.clip import OPEN_CLIP_FILE

MAX_JSON = 2**20  # bytes of a config; one takes 700
CONFIGS = ("open_clip_config.json", "config.json")
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
MERGES = ("merges.txt", OPEN_CLIP_FILE)
CLIP_REPOSITORY = "hf-hub:openai/clip-vit-large-patch14"  # whose merges.txt open_clip itself publishes with its models
CLIP_FINGERPRINT = (
    "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"  # ClipTokenizer's, of CLIP's merges
)
CROPS: dict[tuple[str, str], Crop] = {  # by resize mode and interpolation
    ("shortest", "bicubic"): "clip",
    ("shortest", "bilinear"): "clip_bilinear",
    ("squash", "bicubic"): "squash_bicubic",
    ("squash", "bilinear"): "squash",
}


class OpenClipWeights(NamedTuple):
    """Weights by open_clip's names, and the statistics by which images are normalised for them."""

    file: Path
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def state_for(self, model: CoCa) -> dict[str, Any]:
        """Read and convert the weights: a state dict of `model`, which may be on the meta device."""
        return convert_open_clip(read_open_clip(self.file), model, mean=self.mean, std=self.std)


class OpenClipFiles(NamedTuple):
    """A model in a folder in one of open_clip's layouts, described by arguments of `open_clip_coca`."""

    source: Path  # of the description
    builder: str
    arguments: dict[str, Any]
    crop: Crop
    weights: OpenClipWeights


def config_of(files: Iterable[Path]) -> tuple[Path, dict[str, Any]] | None:
    """Returns the file of open_clip's architecture among those given, and its content; None if none is.

    A config.json is one if it has the key `multimodal_cfg` or `model_cfg`, which descriptions of this library lack.
    """
    named = {file.name: file for file in files}
    for name in CONFIGS:
        if name not in named:
            continue
        try:
            config = json.loads(read_regular_file(named[name], MAX_JSON))
        except (OSError, ValueError, RecursionError) as error:
            if name != CONFIGS[0]:
                continue  # a damaged description of this library, which its reader refuses
            raise ValueError(f"open_clip_files: {named[name]} is not JSON ({error}); download it again") from error
        if isinstance(config, dict) and (name == CONFIGS[0] or config.keys() & {"multimodal_cfg", "model_cfg"}):
            return named[name], config
    return None


def weights_name(files: Iterable[str]) -> str | None:
    """Returns the name of the file of weights among those of a folder; None if there is none."""
    names = set(files)
    checkpoints = sorted(name for name in names if name.endswith(".pt"))
    return next((name for name in (*WEIGHTS, *checkpoints[: len(checkpoints) == 1]) if name in names), None)


def open_clip_files(folder: Path, name: str | None = None) -> OpenClipFiles | None:
    """Describe the model in a folder in one of open_clip's layouts; None if there is none.

    name: owner/name of the repository that it is from, by which `zoo` knows architectures that no file describes.
    Raises ValueError if the config is of another architecture than `open_clip_coca` builds, or if there are no weights.
    """
    files = list(folder.iterdir()) if folder.is_dir() else []
    found = config_of(files)
    if found is None and (name is None or name not in zoo()):
        return None
    file = weights_name(path.name for path in files)
    if file is None:
        raise ValueError(
            f"open_clip_files: {folder} must hold one of {', '.join(WEIGHTS)}, or one .pt, got "
            f"{', '.join(sorted(path.name for path in files)) or 'nothing'}; download the weights too"
        )
    weights = OpenClipWeights(folder / file)
    if found is None:
        assert name is not None
        builder = zoo()[name].builder
        parameters = inspect.signature(OPEN_CLIP_MODELS[builder]).parameters
        return OpenClipFiles(folder, builder, {key: p.default for key, p in parameters.items()}, "clip", weights)
    arguments, crop, mean, std = read_config(*found)
    return OpenClipFiles(found[0], "open_clip_coca", arguments, crop, weights._replace(mean=mean, std=std))


def read_config(
    file: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Any], Crop, tuple[float, ...], tuple[float, ...]]:
    """Returns the arguments of `open_clip_coca`, and crop, mean and deviation, for the content of a config.

    Raises ValueError for what this library does not have.
    """
    arguments = model_arguments(file, config.get("model_cfg", config))
    return arguments, *preprocessing(file, config.get("preprocess_cfg") or {})


def preprocessing(file: Path, config: Mapping[str, Any]) -> tuple[Crop, tuple[float, ...], tuple[float, ...]]:
    """Returns crop, mean and deviation of open_clip's `preprocess_cfg`, with its defaults.

    Its size is not read: open_clip takes that of the vision tower. Raises ValueError for values that no crop has.
    """
    mode, resampling = config.get("resize_mode") or "shortest", config.get("interpolation") or "bicubic"
    if (mode, resampling) not in CROPS:
        known = ", ".join(" and ".join(pair) for pair in CROPS)
        raise ValueError(
            f"open_clip_files: {file}: resize_mode and interpolation must be one of {known}, got {mode} and "
            f"{resampling}; open the model with open_clip"
        )
    statistics = [config.get(key) or default for key, default in (("mean", CLIP_MEAN), ("std", CLIP_STD))]
    for key, values in zip(("mean", "std"), statistics, strict=True):
        fine = isinstance(values, list | tuple) and len(values) == 3 and all(type(x) in (int, float) for x in values)
        if not fine or (key == "std" and min(values) <= 0):
            raise ValueError(
                f"open_clip_files: {file}: {key} must be three numbers, those of std above 0, got {str(values)[:60]}; "
                "was it edited?"
            )
    mean, std = (tuple(map(float, values)) for values in statistics)
    return CROPS[mode, resampling], mean, std


def clip_merges(folder: Path) -> Path:
    """Returns the file of CLIP's merges: of the folder, of the open_clip that is installed, or of the hub.

    Raises OSError or ImportError if none is found, ValueError if what was downloaded is not CLIP's.
    """
    for name in MERGES:
        if (folder / name).is_file():
            return folder / name
    try:
        return installed_merges()
    except FileNotFoundError:
        file = open_repository(CLIP_REPOSITORY).fetch(MERGES[0]) / MERGES[0]
    if (found := ClipTokenizer(file).fingerprint) != CLIP_FINGERPRINT:
        raise ValueError(
            f"clip_merges: {MERGES[0]} of {CLIP_REPOSITORY} must be CLIP's, of fingerprint {CLIP_FINGERPRINT}, got "
            f"{found}; put CLIP's merges.txt beside the weights"
        )
    return file
