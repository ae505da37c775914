"""Vision encoders of other libraries, transformers and timm, and the CoCa around one: `tower_coca`.

A tower is built from a description, JSON values that `grr.inference.towers.find_tower` reads once from the files of a
pre-trained model and that every model folder keeps, so that no folder needs those files again:

    {"library": "transformers", "version": "5.24.0", "config": {"model_type": "dinov2", ...},
     "image_size": 224, "crop": "clip", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
     "source": "hf-hub:facebook/dinov2-small@9c7a..."}
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grr.components import LayerNorm
from grr.models.assemble import T5_VOCABULARY, FeedForwardKind, Norm, TextPosition, captioner
from grr.models.coca import CoCa
from grr.models.sizes import check_sizes

LIBRARIES = {"hf": "transformers", "timm": "timm"}  # by the prefix of a name; each has an extra of its name
TowerWeights = Literal["pretrained", "random"]
# of a transformers config: what does not shape the encoder, or would load other files
IGNORED = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id"),
    *("attn_implementation", "quantization_config", "problem_type", "num_labels"),
}
REFUSED = {  # arguments of timm.create_model that load weights
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Tower(nn.Module):
    """Vision encoder of transformers or timm: normalised images, float [b, 3, h, w] -> [b, p, d].

    The output is transformers' last_hidden_state, or timm's forward_features: class and register tokens, where the
    model has them, precede the patches; maps [b, d, rows, columns] and [b, rows, columns, d] become [b, rows columns,
    d]. Without a parameter that is trained, it runs without a graph and `train` leaves it in evaluation mode. Batch
    norms always use the statistics that they have: those of a micro-batch would depend on the memory of a machine.
    Dropout of the tower, where its config has some, is drawn from torch's generator.

    description: see the module. Raises ImportError without the library, naming its extra, and ValueError if the
    description is not one of a vision encoder whose forward pass takes images alone.
    """

    def __init__(self, description: Mapping[str, Any], *, image_size: int) -> None:
        super().__init__()
        self.description = description
        self.image_mean, self.image_std = (tuple(map(float, description[key])) for key in ("mean", "std"))
        self.inner: Any = build_tower(description)
        self.dim = _width(self.inner)
        self._resized = _resized(self.inner, image_size)
        self._stack = _stack(self.inner)
        # Buffers that no file holds would be lost on the meta device: they become attributes, computed when needed.
        kept = self.inner.state_dict().keys()
        lost = {name: value for name, value in self.inner.named_buffers() if name not in kept}
        self._constants = list(lost)
        self._values: list[Tensor] | None = None
        self._placed: torch.device | None = None
        for name, value in lost.items():
            owner, _, key = name.rpartition(".")
            delattr(self.inner.get_submodule(owner), key)
            setattr(self.inner.get_submodule(owner), key, value)
        self.train()

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the encoder, in order: its longest list, by parameters, of modules of one kind."""
        return [] if self._stack is None else list(self.inner.get_submodule(self._stack).children())

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise ValueError(
                f"Tower: images must be normalised floats, got {images.dtype}; convert bytes with "
                "grr.data.images.normalize and the image_mean and image_std of the tower"
            )
        if self._constants and self._placed != images.device:
            self._place_constants(images.device)
        trained = any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            if hasattr(self.inner, "forward_features"):  # timm
                x = self.inner.forward_features(images)
                channels_last = getattr(self.inner, "output_fmt", "NCHW") == "NHWC"
            else:
                x, channels_last = self.inner(pixel_values=images, **self._resized).last_hidden_state, False
            if x.ndim == 4:
                x = x.flatten(1, 2) if channels_last else x.flatten(2).transpose(1, 2)  # [b, p, d]
        return x

    def train(self, mode: bool = True) -> "Tower":
        """Set training mode, if a parameter is trained; batch norms stay in evaluation mode."""
        super().train(mode and any(p.requires_grad for p in self.parameters()))
        for module in self.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
        return self

    def initial_state(self, seed: int) -> dict[str, Tensor]:
        """Returns parameters and buffers of `inner` by name, as its library draws them for a seed, on the CPU."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            return build_tower(self.description).state_dict()

    def extra_repr(self) -> str:
        return f"{self.description['library']}, source={self.description.get('source')}"

    @torch.inference_mode(False)
    @torch.no_grad()
    def _place_constants(self, device: torch.device) -> None:
        if self._values is None:
            self._values = _buffers_of(self.description, self._constants)
        for name, value in zip(self._constants, self._values, strict=True):
            owner, _, key = name.rpartition(".")
            setattr(self.inner.get_submodule(owner), key, value.to(device))
        self._placed = device


class TowerProjection(nn.Module):
    """Norm and linear layer, from the width of a tower to that of the poolers: [b, p, c] -> [b, p, d]."""

    def __init__(self, tower_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(tower_dim)
        self.linear = nn.Linear(tower_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def tower_coca(
    *,
    vision_encoder: str,
    vision_revision: str | None = None,
    vision_weights: TowerWeights = "pretrained",
    vision_config: dict[str, Any] | None = None,
    text_norm: Norm = "rmsnorm",
    text_feed_forward: FeedForwardKind = "geglu",
    text_position: TextPosition = "rope",
    vocab_size: int = T5_VOCABULARY,
    context_length: int = 64,
    num_queries: int = 64,
    image_size: int | None = None,
    dim: int = 768,
    num_heads: int = 12,
    text_layers: int = 12,
    multimodal_layers: int = 12,
    text_ffn_multiplier: float = 4.0,
    dropout: float = 0.0,
    qk_norm: bool = False,
    tied_embeddings: bool = False,
    temperature: float = 0.07,
    logit_bias: float = 0.0,
    learned_temperature: bool = False,
) -> CoCa:
    """Build a CoCa around a vision encoder of transformers or timm: GRR-CoCa's poolers and text decoders.

        tower = grr.inference.towers.find_tower("hf/facebook/dinov2-small")
        model = grr.create_model("tower_coca", **tower.arguments)
        grr.inference.towers.load_tower(tower, model)

    `vision_encoder`, `vision_revision` and `vision_weights` say where the tower is from; it is built from
    `vision_config` and `image_size`, which `find_tower` reads, as recipes/pretrain.py does. Its weights are drawn here.
    Its output is normalised and projected to the width `dim` (`TowerProjection`, the part pooler_norm of the model).
    Raises ValueError without vision_config or image_size, ImportError without the library of the tower, and as `coca`.
    """
    if vision_config is None or image_size is None:
        raise ValueError(
            f"tower_coca: vision_config and image_size must describe the tower {vision_encoder}, got "
            f"{vision_config=}, {image_size=}; take them from grr.inference.towers.find_tower"
        )
    check_sizes("tower_coca", locals())
    tower = Tower(vision_config, image_size=image_size)
    return captioner(
        tower,
        pooler_norm=TowerProjection(tower.dim, dim),
        text_norm=text_norm,
        text_feed_forward=text_feed_forward,
        text_position=text_position,
        vocab_size=vocab_size,
        context_length=context_length,
        num_queries=num_queries,
        dim=dim,
        num_heads=num_heads,
        text_layers=text_layers,
        multimodal_layers=multimodal_layers,
        text_ffn_multiplier=text_ffn_multiplier,
        dropout=dropout,
        qk_norm=qk_norm,
        tied_embeddings=tied_embeddings,
        temperature=temperature,
        logit_bias=logit_bias,
        learned_temperature=learned_temperature,
    )


TOWER_MODELS: dict[str, Callable[..., CoCa]] = {"tower_coca": tower_coca}


def build_tower(description: Mapping[str, Any]) -> nn.Module:
    """Build the encoder of a description, with the initial weights of its library, on the default device.

    Raises as `Tower` does.
    """
    config = dict(description["config"])
    if description["library"] == "timm":
        return _build_timm(config)
    if description["library"] == "transformers":
        return _build_transformers(config)
    raise ValueError(
        f"Tower: library must be one of {', '.join(LIBRARIES.values())}, got {description['library']!r}; was the "
        "description edited?"
    )


def tower_library(name: str) -> ModuleType:
    """Import a library of towers. Raises ImportError, naming the extra, if it is missing or cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ImportError(
            f'tower_coca: towers of {name} need the package {name}, got {why}; pip install "grr-coca[{name}]"'
        ) from error


def transformers_config(config: Mapping[str, Any]) -> Any:
    """Returns the config object of transformers for the config of a description."""
    auto = tower_library("transformers").AutoConfig
    arguments = {k: v for k, v in config.items() if not k.startswith("_") and k not in IGNORED | {"model_type"}}
    return auto.for_model(config["model_type"], **arguments)


def transformers_model(config: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the class of transformers for a config, and its arguments beside the config.

    Raises ValueError if there is none, or if its forward pass takes other inputs than images.
    """
    mapping = tower_library("transformers").MODEL_MAPPING
    cls = mapping.get(type(config), None)
    needed = {} if cls is None else _arguments_of(cls.forward)
    others = [n for n, p in needed.items() if p.default is p.empty and n not in ("self", "pixel_values")]
    if cls is None or "pixel_values" not in needed or others:
        what = "no such model" if cls is None else f"{cls.__name__}({', '.join(list(needed)[1:3])}, ...)"
        raise ValueError(
            "tower_coca: vision_encoder must be a model of transformers' AutoModel whose forward pass needs "
            f"pixel_values alone, got {config.model_type!r}, {what}; name a ViT, such as hf/facebook/dinov2-small"
        )
    return cls, {"add_pooling_layer": False} if "add_pooling_layer" in _arguments_of(cls.__init__) else {}


def _build_transformers(config: dict[str, Any]) -> nn.Module:
    settings = transformers_config(config)
    _, arguments = transformers_model(settings)
    return tower_library("transformers").AutoModel.from_config(settings, **arguments)


def _build_timm(config: dict[str, Any]) -> nn.Module:
    timm = tower_library("timm")
    name, arguments = config.get("architecture"), dict(config.get("model_args") or {}) | {"num_classes": 0}
    if not isinstance(name, str) or not timm.is_model(name) or ":" in name:
        raise ValueError(f"tower_coca: a tower of timm must be one of timm.list_models(), got {name!r}; upgrade timm")
    if wrong := sorted(arguments.keys() & REFUSED):
        raise ValueError(
            f"tower_coca: model_args of {name} must shape the model, got {', '.join(wrong)}; leave them out of its "
            "config.json"
        )
    model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    if not callable(getattr(model, "forward_features", None)):
        raise ValueError(
            f"tower_coca: a tower of timm must have forward_features, got {name}, which has not; name another model"
        )
    return model


def _arguments_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _width(model: nn.Module) -> int:
    """Returns the width of a model's features."""
    config = getattr(model, "config", None)  # of transformers
    width = getattr(model, "num_features", None) if config is None else getattr(config, "hidden_size", None)
    if width is None:
        width = getattr(config, "hidden_sizes", [None])[-1]
    if not isinstance(width, int):
        raise ValueError(
            f"tower_coca: a tower's config must have its width, hidden_size or hidden_sizes, got {width!r} of "
            f"{type(model).__name__}; name another model"
        )
    return width


def _resized(model: nn.Module, image_size: int) -> dict[str, bool]:
    """Returns what a model of transformers is called with for images of another size than its position embeddings'."""
    own = getattr(getattr(model, "config", None), "image_size", image_size)
    other = (own if isinstance(own, int) else own[0]) != image_size
    takes = "interpolate_pos_encoding" in _arguments_of(type(model).forward)
    return {"interpolate_pos_encoding": True} if other and takes else {}


def _stack(model: nn.Module) -> str | None:
    """Returns the name of the list of blocks of a model; None if it has none."""
    found = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
    }
    return max(found, key=lambda name: found[name], default=None)


def _buffers_of(description: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    """Compute the buffers of an encoder, on the CPU, without its parameters where that is possible."""
    values: list[Tensor] = []
    for mode in (_EmptyOnMeta(), nullcontext()):  # some models allocate buffers by torch.empty as well
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), mode:
            buffers = dict(build_tower(description).named_buffers())
        values = [buffers[name] for name in names]
        if not any(value.is_meta for value in values):
            break
    return values


class _EmptyOnMeta(TorchFunctionMode):
    """Let torch.empty, which makes parameters, allocate nothing, where a model is built for its buffers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {})
        return func(*args, **kwargs)
