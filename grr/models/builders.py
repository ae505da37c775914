"""Builders: the named models and sizes, each a function whose signature shows all arguments and its own defaults.

GRR-CoCa, its baseline, the original CoCa and all sizes are `coca` with other defaults, so a model is described once.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn

from grr.config.spelling import check_arguments, did_you_mean
from grr.models.assemble import (
    MULTIPLIERS,
    T5_VOCABULARY,
    FeedForwardKind,
    Norm,
    Position,
    TextPosition,
    coca,
    text_decoder,
    vision_transformer,
)
from grr.models.coca import CoCa, VisionTransformer
from grr.models.open_clip import OPEN_CLIP_MODELS
from grr.models.towers import TOWER_MODELS

__all__ = [
    "MODELS",
    "MULTIPLIERS",
    "T5_VOCABULARY",
    "FeedForwardKind",
    "Norm",
    "Position",
    "TextPosition",
    "baseline_coca",
    "baseline_vit",
    "coca",
    "create_model",
    "grr_coca",
    "grr_coca_2b",
    "grr_coca_large",
    "grr_coca_small",
    "grr_coca_tiny",
    "grr_vit",
    "list_models",
    "original_coca",
    "original_coca_2b",
    "preset",
    "text_decoder",
    "vision_transformer",
]

# --- the models of the paper ---------------------------------------------------------------------------------------
# `locals()` in the first line of a function holds its arguments, so that they are listed once, in the signature.


def grr_vit(
    *,
    norm: Norm = "rmsnorm",
    feed_forward: FeedForwardKind = "geglu",
    position: Position = "rope",
    image_size: int = 288,
    patch_size: int = 18,
    dim: int = 768,
    num_heads: int = 12,
    num_layers: int = 12,
    ffn_multiplier: float | None = None,
    qk_norm: bool = False,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
) -> VisionTransformer:
    """Build the GRR vision encoder: RMSNorm, GEGLU and rotary positions in every block.

    86,487,384 parameters at the defaults. Source: GRR-CoCa, section 3.1 and figure 1.
    Raises ValueError as `vision_transformer` does.
    """
    return vision_transformer(**locals())


def baseline_vit(
    *,
    norm: Norm = "layernorm",
    feed_forward: FeedForwardKind = "mlp",
    position: Position = "sinusoidal",
    image_size: int = 288,
    patch_size: int = 18,
    dim: int = 768,
    num_heads: int = 12,
    num_layers: int = 12,
    ffn_multiplier: float | None = None,
    qk_norm: bool = False,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
) -> VisionTransformer:
    """Build the classic ViT: LayerNorm, GELU MLP and sinusoidal positions.

    85,801,728 parameters at the defaults. Source: GRR-CoCa, figure 1; Dosovitskiy et al. 2020.
    Raises ValueError as `vision_transformer` does.
    """
    return vision_transformer(**locals())


def grr_coca(
    *,
    vision_norm: Norm = "rmsnorm",
    vision_feed_forward: FeedForwardKind = "geglu",
    vision_position: Position = "rope",
    text_norm: Norm = "rmsnorm",
    text_feed_forward: FeedForwardKind = "geglu",
    text_position: TextPosition = "rope",
    vocab_size: int = T5_VOCABULARY,
    context_length: int = 64,
    num_queries: int = 64,
    image_size: int = 288,
    patch_size: int = 18,
    dim: int = 768,
    num_heads: int = 12,
    vision_layers: int = 12,
    text_layers: int = 12,
    multimodal_layers: int = 12,
    vision_ffn_multiplier: float | None = None,
    text_ffn_multiplier: float = 4.0,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
    qk_norm: bool = False,
    pooler_norm: bool = False,
    tied_embeddings: bool = False,
    temperature: float = 0.07,
    logit_bias: float = 0.0,
    learned_temperature: bool = False,
) -> CoCa:
    """Build GRR-CoCa: RMSNorm, GEGLU and rotary positions in all three towers.

    394,548,926 parameters at the defaults. Source: GRR-CoCa, section 3.1 and table 1. Raises ValueError as `coca` does.
    """
    return coca(**locals())


def baseline_coca(
    *,
    vision_norm: Norm = "layernorm",
    vision_feed_forward: FeedForwardKind = "mlp",
    vision_position: Position = "sinusoidal",
    text_norm: Norm = "rmsnorm",
    text_feed_forward: FeedForwardKind = "geglu",
    text_position: TextPosition = "rope",
    vocab_size: int = T5_VOCABULARY,
    context_length: int = 64,
    num_queries: int = 64,
    image_size: int = 288,
    patch_size: int = 18,
    dim: int = 768,
    num_heads: int = 12,
    vision_layers: int = 12,
    text_layers: int = 12,
    multimodal_layers: int = 12,
    vision_ffn_multiplier: float | None = None,
    text_ffn_multiplier: float = 4.0,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
    qk_norm: bool = False,
    pooler_norm: bool = False,
    tied_embeddings: bool = False,
    temperature: float = 0.07,
    logit_bias: float = 0.0,
    learned_temperature: bool = False,
) -> CoCa:
    """Build the baseline CoCa: GRR-CoCa's text decoders with the classic ViT.

    393,863,270 parameters at the defaults. Source: GRR-CoCa, section 3.1 and table 1. Raises ValueError as `coca` does.
    """
    return coca(**locals())


def original_coca(
    *,
    vision_norm: Norm = "layernorm",
    vision_feed_forward: FeedForwardKind = "mlp",
    vision_position: Position = "sinusoidal",
    text_norm: Norm = "layernorm",
    text_feed_forward: FeedForwardKind = "mlp",
    text_position: TextPosition = "sinusoidal",
    vocab_size: int = T5_VOCABULARY,
    context_length: int = 64,
    num_queries: int = 64,
    image_size: int = 288,
    patch_size: int = 18,
    dim: int = 768,
    num_heads: int = 12,
    vision_layers: int = 12,
    text_layers: int = 12,
    multimodal_layers: int = 12,
    vision_ffn_multiplier: float | None = None,
    text_ffn_multiplier: float = 4.0,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
    qk_norm: bool = False,
    pooler_norm: bool = False,
    tied_embeddings: bool = False,
    temperature: float = 0.07,
    logit_bias: float = 0.0,
    learned_temperature: bool = False,
) -> CoCa:
    """Build the CoCa of Yu et al. 2022: LayerNorm, GELU MLP and absolute positions in all three towers.

    Raises ValueError as `coca` does.
    """
    return coca(**locals())


# --- sizes ---------------------------------------------------------------------------------------------------------


def grr_coca_tiny(
    *,
    vision_norm: Norm = "rmsnorm",
    vision_feed_forward: FeedForwardKind = "geglu",
    vision_position: Position = "rope",
    text_norm: Norm = "rmsnorm",
    text_feed_forward: FeedForwardKind = "geglu",
    text_position: TextPosition = "rope",
    vocab_size: int = 512,
    context_length: int = 16,
    num_queries: int = 16,
    image_size: int = 32,
    patch_size: int = 8,
    dim: int = 64,
    num_heads: int = 2,
    vision_layers: int = 2,
    text_layers: int = 2,
    multimodal_layers: int = 2,
    vision_ffn_multiplier: float | None = None,
    text_ffn_multiplier: float = 4.0,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
    qk_norm: bool = False,
    pooler_norm: bool = False,
    tied_embeddings: bool = False,
    temperature: float = 0.07,
    logit_bias: float = 0.0,
    learned_temperature: bool = False,
) -> CoCa:
    """Build a GRR-CoCa that trains on a laptop CPU in seconds; the tests use it."""
    return coca(**locals())


def grr_coca_small(
    *,
    vision_norm: Norm = "rmsnorm",
    vision_feed_forward: FeedForwardKind = "geglu",
    vision_position: Position = "rope",
    text_norm: Norm = "rmsnorm",
    text_feed_forward: FeedForwardKind = "geglu",
    text_position: TextPosition = "rope",
    vocab_size: int = T5_VOCABULARY,
    context_length: int = 64,
    num_queries: int = 64,
    image_size: int = 144,
    patch_size: int = 18,
    dim: int = 384,
    num_heads: int = 6,
    vision_layers: int = 6,
    text_layers: int = 6,
    multimodal_layers: int = 6,
    vision_ffn_multiplier: float | None = None,
    text_ffn_multiplier: float = 4.0,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
    qk_norm: bool = False,
    pooler_norm: bool = False,
    tied_embeddings: bool = False,
    temperature: float = 0.07,
    logit_bias: float = 0.0,
    learned_temperature: bool = False,
) -> CoCa:
    """Build a GRR-CoCa for one GPU and a few hours: half the width and half the depth of the paper's."""
    return coca(**locals())


def grr_coca_large(
    *,
    vision_norm: Norm = "rmsnorm",
    vision_feed_forward: FeedForwardKind = "geglu",
    vision_position: Position = "rope",
    text_norm: Norm = "rmsnorm",
    text_feed_forward: FeedForwardKind = "geglu",
    text_position: TextPosition = "rope",
    vocab_size: int = T5_VOCABULARY,
    context_length: int = 64,
    num_queries: int = 64,
    image_size: int = 288,
    patch_size: int = 18,
    dim: int = 1024,
    num_heads: int = 16,
    vision_layers: int = 24,
    text_layers: int = 12,
    multimodal_layers: int = 12,
    vision_ffn_multiplier: float | None = None,
    text_ffn_multiplier: float = 4.0,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
    qk_norm: bool = False,
    pooler_norm: bool = False,
    tied_embeddings: bool = False,
    temperature: float = 0.07,
    logit_bias: float = 0.0,
    learned_temperature: bool = False,
) -> CoCa:
    """Build a GRR-CoCa of the shape of CoCa-Large (Yu et al. 2022, table 1)."""
    return coca(**locals())


def grr_coca_2b(
    *,
    vision_norm: Norm = "rmsnorm",
    vision_feed_forward: FeedForwardKind = "geglu",
    vision_position: Position = "rope",
    text_norm: Norm = "rmsnorm",
    text_feed_forward: FeedForwardKind = "geglu",
    text_position: TextPosition = "rope",
    vocab_size: int = T5_VOCABULARY,
    context_length: int = 64,
    num_queries: int = 64,
    image_size: int = 288,
    patch_size: int = 18,
    dim: int = 1408,
    num_heads: int = 16,
    vision_layers: int = 40,
    text_layers: int = 18,
    multimodal_layers: int = 18,
    vision_ffn_multiplier: float | None = 2.7 / 4 * 6144 / 1408,
    text_ffn_multiplier: float = 2.7 / 4 * 6144 / 1408,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
    qk_norm: bool = False,
    pooler_norm: bool = False,
    tied_embeddings: bool = False,
    temperature: float = 0.07,
    logit_bias: float = 0.0,
    learned_temperature: bool = False,
) -> CoCa:
    """Build a GRR-CoCa of the shape of the largest CoCa (Yu et al. 2022, table 1): 40 + 18 + 18 blocks, width 1,408.

    The MLP width of that model is 6,144. Hidden widths are a multiple of the model's: 6144 / 1408 for an MLP, and
    2.7 / 4 of that for a GEGLU.
    """
    return coca(**locals())


def original_coca_2b(
    *,
    vision_norm: Norm = "layernorm",
    vision_feed_forward: FeedForwardKind = "mlp",
    vision_position: Position = "sinusoidal",
    text_norm: Norm = "layernorm",
    text_feed_forward: FeedForwardKind = "mlp",
    text_position: TextPosition = "sinusoidal",
    vocab_size: int = 64_000,
    context_length: int = 64,
    num_queries: int = 64,
    image_size: int = 288,
    patch_size: int = 18,
    dim: int = 1408,
    num_heads: int = 16,
    vision_layers: int = 40,
    text_layers: int = 18,
    multimodal_layers: int = 18,
    vision_ffn_multiplier: float | None = 6144 / 1408,
    text_ffn_multiplier: float = 6144 / 1408,
    dropout: float = 0.0,
    patch_dropout: float = 0.0,
    qk_norm: bool = False,
    pooler_norm: bool = False,
    tied_embeddings: bool = False,
    temperature: float = 0.07,
    logit_bias: float = 0.0,
    learned_temperature: bool = False,
) -> CoCa:
    """Build the largest CoCa of Yu et al. 2022, table 1: 2.1 B parameters with their vocabulary of 64,000."""
    return coca(**locals())


MODELS: dict[str, Callable[..., CoCa]] = {
    "grr_coca": grr_coca,
    "baseline_coca": baseline_coca,
    "original_coca": original_coca,
    "grr_coca_tiny": grr_coca_tiny,
    "grr_coca_small": grr_coca_small,
    "grr_coca_large": grr_coca_large,
    "grr_coca_2b": grr_coca_2b,
    "original_coca_2b": original_coca_2b,
}


# --- by name -------------------------------------------------------------------------------------------------------


def known_builders() -> dict[str, Callable[..., CoCa]]:
    """Returns all builders by the names that `create_model` takes, those that need a description of a tower as well."""
    return MODELS | OPEN_CLIP_MODELS | TOWER_MODELS


def list_models() -> list[str]:
    """Returns the names that `create_model` knows: of the paper's models, their sizes, open_clip's, and your own."""
    return list(MODELS | OPEN_CLIP_MODELS)


def create_model(name: str, **changes: Any) -> CoCa:
    """Build a model by its name, with some arguments other than its defaults.

        model = create_model("grr_coca", vision_position="rope_2d", dropout=0.1)

    Raises ValueError for a name that `list_models` does not have, or as the builder does; TypeError for an argument
    that the builder does not take.
    """
    models = known_builders()
    if name not in models:
        raise ValueError(
            f"create_model: name must be one of {', '.join(models)}, got {name!r}{did_you_mean(name, models)}; "
            "add a builder of your own to grr.builders.MODELS first"
        )
    parameters = inspect.signature(models[name]).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not any_name:
        check_arguments(f"create_model: {name}", changes, parameters, reference=f"help(grr.builders.{name})")
    model = models[name](**changes)
    model.built_by = name, {key: p.default for key, p in parameters.items() if p.default is not p.empty} | changes
    return model


def check_builder(builder: Callable[..., CoCa]) -> None:
    """Raise ValueError if a builder lacks a keyword-only argument that the recipes set or read."""
    name = getattr(builder, "__name__", "it")
    kinds = {key: parameter.kind for key, parameter in inspect.signature(builder).parameters.items()}
    required = ("vocab_size", "context_length", "image_size")
    if lacking := [key for key in required if kinds.get(key) is not inspect.Parameter.KEYWORD_ONLY]:
        raise ValueError(
            f"check_builder: a builder must have the keyword-only arguments {', '.join(required)}, {name} lacks "
            f"{', '.join(lacking)}; add them after a * in its signature, as in {name}(*, {lacking[0]}: int, ...)"
        )


P = ParamSpec("P")
Model = TypeVar("Model", bound=nn.Module)


def preset(
    builder: Callable[P, Model], name: str, doc: str, /, *args: P.args, **defaults: P.kwargs
) -> Callable[P, Model]:
    """Returns a builder under another name with other defaults, which takes the arguments of `builder`.

    Type checkers and editors read the arguments from `builder`; help() and configs read the new defaults too.
    Raises ValueError if a default is not an argument of `builder`.
    """
    with_defaults: Callable[..., Model] = functools.partial(builder, *args, **defaults)

    @functools.wraps(builder)
    def function(*args: P.args, **arguments: P.kwargs) -> Model:
        return with_defaults(*args, **arguments)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    vars(function)["__signature__"] = _Signature.from_callable(with_defaults)
    return function


class _Signature(inspect.Signature):
    """A signature that help() prints with an argument a line, as it does from Python 3.13 on."""

    __slots__ = ()

    def __str__(self) -> str:
        arguments = list(self.parameters.values())
        if len(arguments) < 2 or any(argument.kind is not argument.KEYWORD_ONLY for argument in arguments):
            return super().__str__()
        lines = "".join(f"    {argument},\n" for argument in arguments)
        return f"(\n    *,\n{lines}) -> {inspect.formatannotation(self.return_annotation)}"


_BUILDERS: tuple[Callable[..., nn.Module], ...] = (vision_transformer, text_decoder, coca, grr_vit, baseline_vit)
for _builder in (*_BUILDERS, *MODELS.values()):
    vars(_builder)["__signature__"] = _Signature.from_callable(_builder)
