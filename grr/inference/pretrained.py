"""Trained models on disk and on the Hugging Face hub: how to find and load them."""

import hashlib
import logging
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grr.checkpoint.adapters import FILE as ADAPTERS
from grr.checkpoint.adapters import apply_adapters, load_adapters
from grr.checkpoint.finite import check_finite_weights
from grr.checkpoint.model_folder import fill_model, load_model_weights
from grr.checkpoint.step_folders import latest_checkpoint
from grr.checkpoint.training_state import load_checkpoint_weights, read_weights
from grr.components import LoRALinear
from grr.data.images import Crop
from grr.files.digest import sha256
from grr.inference.captioner import Captioner
from grr.inference.description import Base, read_description, read_json
from grr.inference.description import Pretrained as Pretrained
from grr.inference.description import build_pretrained as build_pretrained
from grr.inference.description import describe as describe
from grr.inference.hub import is_hub_name, open_repository
from grr.inference.open_clip import (
    CONFIGS,
    MERGES,
    OpenClipFiles,
    clip_merges,
    config_of,
    open_clip_files,
    read_config,
    weights_name,
)
from grr.inference.quantization import load_quantized
from grr.inference.zoo import zoo
from grr.models.coca import CoCa
from grr.parallel.device import check_device, default_device
from grr.parallel.process_group import on_rank_0
from grr.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)


def load(
    path: str | Path | Pretrained, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Captioner:
    """Open a trained model to caption, embed and classify images.

        captioner = load("runs/openmoji")
        captioner = load("hf-hub:laion/CoCa-ViT-B-32-laion2B-s13B-b90k")

    path: a run's folder, its model/, one of its checkpoints, a quantised model, a folder in open_clip's layout, or a
    repository of one of these on the Hugging Face hub, hf-hub:owner/name or hf-hub:owner/name@revision, which its own
    client downloads (see `grr.inference.hub.open_repository`); `grr models` lists some. device: None means the GPU
    where there is one (CUDA, or mps on a Mac), else the CPU. A quantised model computes in `dtype` as well.
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
    `dtype`, dtype is not one of floats, there is no such device, or a quantised model is put on mps.
    """
    source = path if isinstance(path, Pretrained) else find_pretrained(path)
    device = check_device(device, gpus=torch.cuda.device_count(), mps=torch.backends.mps.is_available())
    if source.quantization is not None and device.type == "mps":
        raise ValueError(
            "load_pretrained: a quantised model computes on a CPU or a CUDA GPU, got mps; give device='cpu', or set "
            "GRR_DEVICE=cpu for a recipe"
        )
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
            file = ADAPTERS if source.base else "model.safetensors"
            weights = sha256(source.path / ("manifest.json" if checkpoint else file))
        if source.base is not None:
            weights += source.base.digest
        return hashlib.sha256(repr((source.builder, sorted(source.arguments.items()), weights)).encode()).hexdigest()

    return on_rank_0(digest)


def find_pretrained(path: str | Path, *, adapted: bool = True) -> Pretrained:
    """Read the description of a model: from a model's folder, a checkpoint, a run's folder, or the hub (see `load`).

    Of a run's folder, it is the finished model, or else the newest whole checkpoint. Of the hub, everything that the
    model needs is downloaded and verified. Where adapters are kept beside another model, the description of that one is
    read as well; adapted: whether such a folder is allowed.
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
        file = path / "config.json"
        return _described(path, file, read_json(file), path / "tokenizer.model", adapted=adapted)
    if (path / "progress.json").is_file():
        run = path.resolve().parent.parent  # runs/mine/checkpoints/step_100
        progress = read_json(path / "progress.json")
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


def load_weights(source: Pretrained, model: nn.Module) -> None:
    """Load the weights of a description into a model, plain or sharded. Called by all ranks alike.

    Adapters that were kept beside a model are added to its weights; adapters that the model here has are set to 0.
    Raises ValueError if they are quantized, because such a model cannot be trained (open it with `load_pretrained`); if
    they are a classifier's, which has only some parts of a CoCa, and the model is a CoCa; if one is not finite; and if
    the model that adapters were trained on has changed.
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
    if source.base is not None:
        load_adapted(source, source.base, model, load_weights)
    elif source.open_clip is not None:
        with torch.device("meta"):
            empty = build_pretrained(source)
        fill_model(model, partial(source.open_clip.state_for, empty))
    elif (source.path / "progress.json").is_file():
        load_checkpoint_weights(source.path, model)
    else:
        load_model_weights(source.path, model)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):  # so that the model computes what the weights say
            nn.init.zeros_(layer.lora_b)
    check_finite_weights("load_weights", model.state_dict(), str(source))


def load_adapted(
    source: Pretrained, base: Base, model: nn.Module, load: Callable[[Pretrained, nn.Module], None]
) -> None:
    """Load the weights of the base by `load`, once it was found to be the same, and add what was trained on it.

    Called by all ranks alike. Raises ValueError if the base has changed.
    """
    if (digest := weights_digest(base.source)) != base.digest:
        raise ValueError(
            f"load_weights: the adapters in {source} were trained on other weights than those in {base.source}, got "
            f"sha256 {digest[:12]} for {base.digest[:12]}; put the base there again"
        )
    load(base.source, model)
    checkpoint = (source.path / "progress.json").is_file()
    tensors = read_weights(source.path) if checkpoint else load_adapters(source.path)
    apply_adapters(model, tensors, scale=base.scale, where=str(source))


def tell_of_other_crop(source: Pretrained, crop: Crop) -> None:
    """Log that a run crops images in another way than the training of its pre-trained model, if it does."""
    if crop != source.crop:
        logger.info(
            "%s was trained with another crop of its images; set loader.crop=%s to keep it", source, source.crop
        )


def describe_adapters(description: dict[str, Any], source: Pretrained, *, rank: int, alpha: float) -> dict[str, Any]:
    """Returns the description of a model whose weights are those of `source` and adapters, saved apart from them.

    Called by all ranks alike. Raises ValueError if `source` has its own weights apart from its adapters as well.
    """
    if source.base is not None:
        raise ValueError(
            f"describe_adapters: adapters must be trained on a model with all of its weights, got {source.path}, which "
            f"has adapters beside {source.base.source.path}; train on the model/ of a run with run.merge_adapters=true"
        )
    base = {
        "base": source.repository or str(source.path.absolute()),
        "digest": weights_digest(source),
        "rank": rank,
        "alpha": alpha,
    }
    return description | {"adapter": base}


def _base(file: Path, adapter: Any) -> Base | None:
    """Returns the model that adapters belong to, from a description; None for a model without adapters beside it."""
    if adapter is None:
        return None
    try:
        path, digest, rank, alpha = adapter["base"], adapter["digest"], adapter["rank"], adapter["alpha"]
        scale = float(alpha) / int(rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"find_pretrained: {file} does not describe adapters ({error!r}); was it edited?") from error
    if not isinstance(path, str) or not isinstance(digest, str) or not math.isfinite(scale):
        raise ValueError(f"find_pretrained: {file} does not describe adapters, got {str(adapter)[:80]}; was it edited?")
    try:
        return Base(find_pretrained(path, adapted=False), digest, scale)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"find_pretrained: {file} holds adapters of the model {path}, which cannot be opened: {error}; put it "
            f"there, or write its folder as adapter.base into {file.name}"
        ) from error


def _described(path: Path, file: Path, description: Any, tokenizer: Path, *, adapted: bool) -> Pretrained:
    """Returns the description of the model in a folder, and of the one that its adapters belong to."""
    adapter = description.get("adapter") if isinstance(description, dict) else None
    if adapter is not None and not adapted:
        raise ValueError(f"find_pretrained: {file} describes adapters, not a model with all of its weights")
    return read_description(path, file, description, tokenizer, base=_base(file, adapter))


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
    description = read_json(folder / own[0]) if own[0] in configs else None
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
    source = read_description(path, files.source, description, clip_merges(path), open_clip=files.weights)
    tokenizer = load_tokenizer(source.tokenizer, context_length=files.arguments["context_length"])
    if tokenizer.vocab_size != files.arguments["vocab_size"]:
        raise ValueError(
            f"find_pretrained: {files.source} must have the text_cfg.vocab_size of its vocabulary, "
            f"{tokenizer.vocab_size - 1} in {source.tokenizer}, got {files.arguments['vocab_size'] - 1}; put the "
            f"{MERGES[0]} of the training beside the weights"
        )
    return source
