"""Pre-trained vision encoders of transformers and timm: found on the hub or in a folder, described, and loaded."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from grr.checkpoint.model_folder import fill_model, mismatches
from grr.config.spelling import did_you_mean
from grr.data.images import IMAGENET_MEAN, IMAGENET_STD, Crop
from grr.files.damage import damage
from grr.files.digest import sha256
from grr.inference.description import read_json
from grr.inference.hub import NAME, PREFIX, Repository, open_repository
from grr.models.towers import (
    IGNORED,
    LIBRARIES,
    Tower,
    TowerWeights,
    build_tower,
    tower_library,
    transformers_config,
    transformers_model,
)

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # how images are prepared, in transformers' layout
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BICUBIC, BILINEAR = 3, 2  # numbers of Pillow's filters, as transformers stores them
VISION = "vision_encoder."

logger = logging.getLogger(__name__)


class FoundTower(NamedTuple):
    """A pre-trained vision encoder: how to build it, and where its weights are."""

    name: str  # hf/NAME or timm/NAME
    files: "Path | Repository | None"  # None: a resumed run, whose checkpoint holds the weights and their digest
    weights: TowerWeights
    description: dict[str, Any]  # see grr.models.towers; image_size and crop are those of its own preprocessing
    digest: str | None = None  # of the weights that a resumed run began with

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `tower_coca` that describe the tower."""
        source = {"vision_encoder": self.name, "vision_weights": self.weights}
        return source | {"vision_config": self.description, "image_size": self.description["image_size"]}

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the weights, or "random". They are downloaded, unless they are in the cache."""
        if self.weights == "random":
            return "random"
        if self.digest is not None:
            return self.digest
        assert self.files is not None
        return "+".join(sha256(file) for file in _weight_files(self.files))


def find_tower(name: str, *, revision: str | None = None, weights: TowerWeights = "pretrained") -> FoundTower:
    """Read the description of a pre-trained vision encoder, without its weights.

        tower = find_tower("hf/facebook/dinov2-small")
        tower = find_tower("timm/vit_small_patch14_reg4_dinov2.lvd142m")

    name: hf/NAME, of a model that transformers' AutoModel opens, or timm/NAME. NAME is a folder, in the layout that
    save_pretrained of transformers or save_for_hf of timm.models writes, or else a name on the Hugging Face hub; of
    timm's own models there without the owner. Of a model of images and texts, such as CLIP, the tower is its vision
    encoder. revision: a branch, tag or commit on the hub. weights: "random" if the folder has none.
    Raises ImportError without transformers or timm, or without the hub's client, naming the extra; FileNotFoundError if
    there is no such model; OSError if the hub cannot be reached; and ValueError for another kind of name or of model,
    and for weights that are not safetensors or, in a folder, are damaged.
    """
    prefix, _, rest = name.partition("/")
    if prefix not in LIBRARIES or not rest:
        raise ValueError(
            f"find_tower: vision_encoder must be hf/NAME, of transformers, or timm/NAME, got {name!r}"
            f"{did_you_mean(prefix, LIBRARIES)}; write hf/facebook/dinov2-small, for example, or hf/ and a folder"
        )
    library = LIBRARIES[prefix]
    tower_library(library)  # raises ImportError before anything is downloaded
    files = _files(name, rest, library, revision)
    listed = _listed(files)
    if "config.json" not in listed:
        raise FileNotFoundError(
            f"find_tower: {name} must have a config.json of {library}, got the files "
            f"{', '.join(sorted(listed))[:200]}; name the repository or folder of a model"
        )
    if weights == "pretrained":
        _check_safetensors(name, listed)
        if isinstance(files, Path):
            _check_readable(_weight_files(files))
    raw = read_json(_fetched(files, "config.json") / "config.json")
    if not isinstance(raw, dict):
        raise ValueError(f"find_tower: config.json of {name} must be a mapping, got {str(raw)[:40]}; copy it again")
    read = _read_timm if library == "timm" else _read_transformers
    config, images = read(name, raw, files, weights)
    source = str(files) if isinstance(files, Repository) else str(files.absolute())
    version = str(tower_library(library).__version__)
    description = {"library": library, "version": version, "config": config, **images, "source": source}
    return FoundTower(name, files, weights, description)


def open_tower(arguments: Mapping[str, Any], folder: Path) -> FoundTower | None:
    """Returns the tower that the arguments of a builder name; None for a builder without one.

    folder: of the run. Where a checkpoint there began with the same tower by its name, the description is that of the
    checkpoint, and neither the hub nor the tower's folder is read. A tower of another name is read, to be compared.
    Raises as `find_tower` does, and ValueError if vision_config is given for a new run and differs.
    """
    if "vision_encoder" not in arguments:
        return None
    name, revision, weights = (arguments[f"vision_{key}"] for key in ("encoder", "revision", "weights"))
    saved = None
    for file in (folder / "checkpoints").glob("step_*/progress.json"):  # which may differ in the name of the tower
        progress = read_json(file)
        old = progress["model"]["arguments"]
        saved = old.get("vision_config") or saved
        if saved is not None and _same_place(name, revision, old):
            return FoundTower(name, None, weights, saved, progress["identity"]["tower"])
    found = find_tower(name, revision=revision, weights=weights)
    if saved is not None:
        place = {key: saved[key] for key in ("version", "source")}  # not what the tower is
        return found._replace(description=found.description | place)
    given = arguments["vision_config"]
    if given is not None and given != found.description:
        differ = sorted(key for key in given.keys() | found.description if given.get(key) != found.description.get(key))
        raise ValueError(
            f"open_tower: vision_config must be what the files of {name} say, got another {', '.join(differ)}; leave "
            "vision_config out"
        )
    return found


def load_tower(tower: FoundTower, model: nn.Module) -> None:
    """Load the pre-trained weights into the vision encoder of a model, plain or sharded. Called by all ranks alike.

    Rank 0 reads them. Random weights stay those that `initialize` drew. Raises ValueError naming a damaged file, or
    every parameter that is missing or of another shape; tensors of other parts, such as a text encoder or a classifier,
    are not used.
    """
    encoder = getattr(model, "vision_encoder", None)
    if not isinstance(encoder, Tower):
        raise ValueError(
            f"load_tower: the model must have a tower as its vision encoder, got {type(encoder).__name__}; build it "
            "with tower_coca"
        )
    if tower.weights == "random":
        return

    def read() -> dict[str, Any]:
        state = _read_weights(tower)
        return {f"{VISION}inner.{name}": value for name, value in state.items()}

    fill_model(model, read, partial=True)
    logger.info("the weights of the vision encoder are those of %s", tower.description["source"])


def _images(
    size: int, crop: Crop, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> dict[str, Any]:
    """Returns how a tower prepares its images, as its description has it."""
    return {"image_size": size, "crop": crop, "mean": list(mean), "std": list(std)}


def _files(name: str, rest: str, library: str, revision: str | None) -> Path | Repository:
    folder = Path(rest).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"find_tower: a folder does not have revisions, got {revision=} for {name}; leave vision_revision out"
            )
        return folder
    owned = f"timm/{rest}" if library == "timm" and "/" not in rest else rest
    if rest.startswith(("/", ".", "~")) or not NAME.fullmatch(owned):
        form = "timm/name, or timm/owner/name" if library == "timm" else "hf/owner/name"
        raise FileNotFoundError(
            f"find_tower: vision_encoder must be a folder or a model on the hub, got {name!r}, and there is no folder "
            f"{folder}; name one in the layout of {library}, or a model on the hub as {form}"
        )
    return open_repository(f"{PREFIX}{owned}" + (f"@{revision}" if revision else ""))


def _same_place(name: str, revision: str | None, old: Mapping[str, Any]) -> bool:
    """Whether a name is that of the arguments which a checkpoint holds, or leads to the same folder."""
    if (name, revision) == (old["vision_encoder"], old["vision_revision"]):
        return True
    prefix, _, rest = name.partition("/")
    config = old["vision_config"]
    folder = (LIBRARIES.get(prefix), str(Path(rest).expanduser().absolute()))
    return revision is None and folder == (config["library"], config["source"])


def _listed(files: Path | Repository) -> frozenset[str]:
    return files.files if isinstance(files, Repository) else frozenset(file.name for file in files.iterdir())


def _fetched(files: Path | Repository, *names: str) -> Path:
    return files.fetch(*names) if isinstance(files, Repository) else files


def _check_safetensors(name: str, listed: frozenset[str]) -> None:
    if not {WEIGHTS, INDEX} & listed:
        others = sorted(file for file in listed if file.endswith((".bin", ".pt", ".pth", ".msgpack", ".h5", ".npz")))
        raise ValueError(
            f"find_tower: the weights of {name} must be {WEIGHTS}, which holds no code, got "
            f"{', '.join(others) or 'none'}; name a revision that has it, or set vision_weights=random to "
            "draw them"
        )


def _read_transformers(
    name: str, raw: dict[str, Any], files: Path | Repository, weights: TowerWeights
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the config of the vision encoder, and how it prepares its images."""
    library = tower_library("transformers")
    try:
        settings = library.AutoConfig.from_pretrained(_fetched(files, "config.json"), local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        why = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"find_tower: {name} must be a model of transformers {library.__version__}, got {raw.get('model_type')!r}: "
            f"{why}; upgrade transformers, or name another model"
        ) from error
    settings = getattr(settings, "vision_config", settings)
    if hasattr(settings, "vision_use_head"):
        settings.vision_use_head = False  # SigLIP's pooler, which is not read
    transformers_model(settings)  # raises ValueError for another kind of model
    config = {k: v for k, v in settings.to_diff_dict().items() if not k.startswith("_") and k not in IGNORED}
    own = getattr(settings, "image_size", 224)
    size = own if isinstance(own, int) else own[0]
    processors = [file for file in PROCESSORS if file in _listed(files)]
    if not processors:
        if weights == "pretrained":
            raise ValueError(
                f"find_tower: {name} must have a {PROCESSORS[0]}, whose mean and deviation its weights were trained "
                "with, got none; save its image processor into the folder as well"
            )
        return config, _images(size, "squash")
    processor = read_json(_fetched(files, processors[0]) / processors[0])
    return config, _images_of(name, processor.get("image_processor", processor), size)


def _images_of(name: str, processor: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns how an image processor of transformers prepares images; the margin that it crops away is kept."""
    sizes = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    if isinstance(sizes, Mapping):
        sides = {sizes[key] for key in ("height", "width", "shortest_edge") if key in sizes}
        if len(sides) > 1:
            raise ValueError(
                f"find_tower: images of {name} must be square, got {dict(sizes)}; set model.image_size, and a size of "
                "one number in its preprocessor_config.json"
            )
        size = sides.pop() if sides else size
    elif isinstance(sizes, int):
        size = sizes
    keeps_shape = bool(processor.get("do_center_crop")) or (
        isinstance(processor.get("size"), Mapping) and "shortest_edge" in processor["size"]
    )
    bicubic = processor.get("resample", BICUBIC) != BILINEAR
    crop: Crop = (
        ("clip" if bicubic else "clip_bilinear") if keeps_shape else ("squash_bicubic" if bicubic else "squash")
    )
    if not processor.get("do_normalize", True):
        return _images(size, crop, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not (_is_rgb(mean) and _is_rgb(std)):
        raise ValueError(
            f"find_tower: {name} must have image_mean and image_std of three numbers, got {mean} and {std}; add them "
            f"to its {PROCESSORS[0]}"
        )
    return _images(size, crop, mean, std)


def _is_rgb(numbers: Any) -> TypeGuard[list[float]]:
    return isinstance(numbers, list) and len(numbers) == 3 and all(isinstance(x, int | float) for x in numbers)


def _read_timm(
    name: str, raw: dict[str, Any], files: Path | Repository, weights: TowerWeights
) -> tuple[dict[str, Any], dict[str, Any]]:
    own = raw.get("pretrained_cfg", raw)
    config = {"architecture": raw.get("architecture"), "model_args": raw.get("model_args") or {}}
    mean, std, sizes = own.get("mean"), own.get("std"), own.get("input_size")
    if not (_is_rgb(mean) and _is_rgb(std) and isinstance(sizes, list) and len(set(sizes[1:])) == 1):
        raise ValueError(
            f"find_tower: {name} must have pretrained_cfg with mean, std and a square input_size, got {mean}, {std} "
            f"and {sizes}; name a model that timm saved"
        )
    bicubic, squash = own.get("interpolation", "bicubic") != "bilinear", own.get("crop_mode") == "squash"
    crop: Crop = ("squash_bicubic" if bicubic else "squash") if squash else ("clip" if bicubic else "clip_bilinear")
    return config, _images(sizes[1], crop, mean, std)


def _weight_files(files: Path | Repository) -> list[Path]:
    """Returns the safetensors files of a tower, downloaded and verified if they are on the hub."""
    names = [WEIGHTS]
    if WEIGHTS not in _listed(files):
        index = read_json(_fetched(files, INDEX) / INDEX)
        names = sorted(set(index["weight_map"].values()))
    folder = _fetched(files, *names)
    return [folder / name for name in names]


def _check_readable(files: Sequence[Path]) -> None:
    """Raise ValueError if a safetensors file is missing, or its header cannot be read or is of another size."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"load_tower: {file} must be there, as {INDEX} beside it names it; copy the folder again")
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"load_tower: {file} cannot be read: {damage(file)}") from error


def _read_weights(tower: FoundTower) -> dict[str, Tensor]:
    """Returns the state dict of the encoder, whole and in float32, under today's names of its library."""
    assert tower.files is not None
    files = _weight_files(tower.files)
    _check_readable(files)
    with torch.device("meta"):
        wanted = build_tower(tower.description).state_dict()
    if tower.description["library"] == "timm":
        state: dict[str, Any] = {}
        for file in files:
            state |= load_file(file)
    else:
        library = tower_library("transformers")
        settings = transformers_config(tower.description["config"])
        with _quiet(library), torch.device("cpu"):
            model, report = library.AutoModel.from_pretrained(
                files[0].parent,
                config=settings,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **transformers_model(settings)[1],
            )
        state = {name: value for name, value in model.state_dict().items() if name not in report["missing_keys"]}
    found = {name: str(list(value.shape)) for name, value in state.items() if name in wanted}
    if lines := mismatches(found, {name: str(list(value.shape)) for name, value in wanted.items()}, "model"):
        raise ValueError(
            f"load_tower: the weights of {tower.name} do not fit the encoder that its config.json describes:\n{lines}\n"
            "name another revision, or upgrade the library"
        )
    return {name: state[name] for name in wanted}


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Let transformers print errors only: what it does not use of a file is expected here."""
    logs = library.utils.logging
    level = logs.get_verbosity()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        logs.enable_progress_bar()
