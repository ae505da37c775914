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
# Keys of a config, by section, that become arguments of open_clip_coca; with open_clip's defaults.
READ: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "patch_size": 16,
        "image_size": 224,
        "attn_pooler_queries": 256,
        "attn_pooler_heads": 8,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    "multimodal_cfg": {"width": 512, "heads": 8, "layers": 12},
}
_PLAIN_BLOCK = {
    "ls_init_value": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
# Keys whose only value is that of open_clip_coca, which is open_clip's default too but for those in GIVEN.
FIXED: dict[str, dict[str, Any]] = {
    "": {"quick_gelu": False, "init_logit_bias": None, "pad_id": 0},
    "vision_cfg": {
        "attentional_pool": True,
        "output_tokens": True,
        "mlp_ratio": 4.0,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "pool_type": "tok",
        "timm_model_name": None,
        **_PLAIN_BLOCK,
    },
    "text_cfg": {
        "embed_cls": True,
        "output_tokens": True,
        "mlp_ratio": 4.0,
        "pad_id": 0,
        "no_causal_mask": False,
        "proj_type": "linear",
        "proj_bias": False,
        "hf_model_name": None,
        "hf_tokenizer_name": None,
        "tokenizer_kwargs": None,
        "correct_cls_mask": False,
        **_PLAIN_BLOCK,
    },
    "multimodal_cfg": {"ls_init_value": None},
}
GIVEN = (("vision_cfg", "attentional_pool"), ("vision_cfg", "output_tokens"), ("text_cfg", "embed_cls"))
# Keys that open_clip does not read for such a model, or only in training.
IGNORED: dict[str, set[str]] = {
    "": {"embed_dim", "custom_text", "init_logit_scale", "nonscalar_logit_scale", *READ},
    "vision_cfg": {"patch_dropout", "final_ln_after_pool", "timm_model_pretrained", "timm_pool", "timm_proj"},
    "text_cfg": {"pool_type", "eos_id", "final_ln_after_pool", "tokenizer_mode", "hf_model_pretrained", "hf_proj_type"},
    "multimodal_cfg": {"context_length", "vocab_size", "attn_pooler_heads", "n_queries", "dim_head", "mlp_ratio"},
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


def model_arguments(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `open_clip_coca` for open_clip's description of an architecture.

    Raises ValueError that lists the keys that are missing, unknown, or have values that `open_clip_coca` does not.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("multimodal_cfg"), Mapping):
        raise ValueError(
            f"open_clip_files: {file} must describe a CoCa, with a multimodal_cfg, got the keys "
            f"{', '.join(config)[:200]}: it is another model; give the repository of a CoCa"
        )
    sections = {key: config[key] if isinstance(config.get(key), Mapping) else {} for key in READ}
    faults = [fault for key, section in {"": config, **sections}.items() for fault in _faults(key, section)]
    vision, text, multimodal = ({**READ[key], **sections[key]} for key in READ)
    dim, size = config.get("embed_dim"), vision["image_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    numbers = {f"{key}.{name}": {**READ[key], **sections[key]}[name] for key in READ for name in READ[key]}
    numbers |= {"embed_dim": dim, "vision_cfg.image_size": size}
    faults += [f"{key} must be a whole number, got {n!r}" for key, n in numbers.items() if type(n) is not int]
    if not (dim == text["width"] == multimodal["width"]) or text["heads"] != multimodal["heads"]:
        faults.append(
            "embed_dim and the width and heads of text_cfg and multimodal_cfg must agree, got "
            f"{dim}, {text['width']} and {multimodal['width']}, {text['heads']} and {multimodal['heads']}"
        )
    if faults:
        raise ValueError(
            "\n  ".join([f"open_clip_files: {file} must describe an architecture that this library has:", *faults])
            + "\nopen it with open_clip"
        )
    return {
        "vocab_size": text["vocab_size"] + 1,  # with CLS
        "context_length": text["context_length"] + 1,
        "image_size": size,
        "patch_size": vision["patch_size"],
        "vision_dim": vision["width"],
        "vision_heads": vision["width"] // max(1, vision["head_width"]),
        "vision_layers": vision["layers"],
        "num_queries": vision["attn_pooler_queries"],
        "pooler_heads": vision["attn_pooler_heads"],
        "dim": dim,
        "num_heads": text["heads"],
        "text_layers": text["layers"],
        "multimodal_layers": multimodal["layers"],
    }


def _faults(key: str, section: Mapping[str, Any]) -> list[str]:
    """Returns what a section of a config has that `open_clip_coca` does not."""
    place, fixed, faults = f"{key}." if key else "", FIXED[key], []
    for name, value in section.items():
        if name in fixed:
            if value != fixed[name] and (value or fixed[name]):  # false, null and {} are all off
                faults.append(f"{place}{name} must be {fixed[name]!r}, got {value!r}")
        elif name not in READ.get(key, {}) and name not in IGNORED[key]:
            faults.append(f"{place}{name} is not known, got {str(value)[:60]}")
    return faults + [
        f"{place}{name} must be True, got nothing" for k, name in GIVEN if k == key and name not in section
    ]


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
