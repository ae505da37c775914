"""Cost of a model per tower: parameters, and floating-point operations (FLOPs) of one image with its caption.

FLOPs are counted as in torch's FlopCounterMode: matrix products only, two operations per multiply-add, causal attention
as full attention. Norms, softmax, GELU, rotations and sums are not counted.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn

from grr.components import num_kept
from grr.config.spelling import check_arguments
from grr.data import Batch
from grr.models.assemble import MULTIPLIERS
from grr.models.coca import CoCa
from grr.parallel.blocks import blocks

SIZES = {
    *("vocab_size", "context_length", "image_size", "patch_size", "dim", "num_queries"),
    *("vision_layers", "vision_feed_forward", "vision_ffn_multiplier"),
    *("text_layers", "text_feed_forward", "text_ffn_multiplier", "multimodal_layers"),
}  # arguments of `coca` from which its FLOPs follow


class Towers(NamedTuple):
    """Count per part of a CoCa."""

    vision: int
    poolers: int
    text: int
    multimodal: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


def parameters(model: CoCa) -> Towers:
    """Count the parameters of a model on any device; tied embeddings count as text, a learned temperature as pooler."""
    counted: set[int] = set()

    def count(*modules: nn.Module) -> int:
        new = {id(p): p for module in modules for p in module.parameters() if id(p) not in counted}
        counted.update(new)
        return sum(p.numel() for p in new.values())

    poolers = (model.pooler_norm, model.generative_pooler, model.contrastive_pooler, model.logit_scale)
    decoder = model.multimodal_decoder
    return Towers(
        count(model.vision_encoder),
        count(*poolers),
        count(model.text_decoder, model.text_projection),
        count(decoder.blocks, decoder.norm),
        count(decoder.head),
    )


def forward_flops(
    builder: Callable[..., CoCa], *, text_length: int | None = None, training: bool = False, **arguments: Any
) -> Towers:
    """Compute the FLOPs of a forward pass of the model that `builder(**arguments)` builds, without building it.

    text_length: tokens that are read and scored; by default context_length, as for an untrimmed caption. training:
    read only the patches that patch dropout keeps. Raises TypeError for an argument that the builder does not take,
    ValueError if text_length is below 1 or if the builder is not a preset of `coca` (`flops_are_known`).
    """
    name = getattr(builder, "__name__", str(builder))
    if not flops_are_known(builder):
        raise ValueError(
            f"forward_flops: FLOPs are known for the presets of coca only, got {name}; "
            "count those of another model with torch.utils.flop_counter.FlopCounterMode"
        )
    signature = inspect.signature(builder)
    check_arguments(f"forward_flops: {name}", arguments, signature.parameters, reference=f"help(grr.builders.{name})")
    bound = signature.bind(**arguments)
    bound.apply_defaults()
    a = SimpleNamespace(**bound.arguments)
    d, n = a.dim, a.num_queries
    s = a.context_length if text_length is None else text_length
    if s < 1:
        raise ValueError(
            f"forward_flops: text_length must be at least 1, got {text_length=}; leave it out for context_length"
        )
    patches = (a.image_size // a.patch_size) ** 2
    p = num_kept(patches, bound.arguments.get("patch_dropout", 0.0)) if training else patches
    vision_hidden = int((a.vision_ffn_multiplier or MULTIPLIERS[a.vision_feed_forward]) * d)
    vision_block = _attention(p, p, d) + _feed_forward(p, d, vision_hidden, a.vision_feed_forward)
    text_block = _attention(s, s, d) + _feed_forward(s, d, int(a.text_ffn_multiplier * d), a.text_feed_forward)
    return Towers(
        vision=_linear(patches, 3 * a.patch_size**2, d) + a.vision_layers * vision_block,
        poolers=_pooler(n, p, d) + _pooler(1, n, d),
        text=a.text_layers * text_block,
        multimodal=a.multimodal_layers * (text_block + _attention(s, n, d)),
        head=_linear(s, d, a.vocab_size),
    )


def flops_are_known(builder: Callable[..., CoCa]) -> bool:
    """Returns whether `forward_flops` can compute the FLOPs: whether the builder takes the sizes that `coca` takes."""
    return inspect.signature(builder).parameters.keys() >= SIZES


def batch_flops(builder: Callable[..., CoCa], batches: Iterable[Batch], **arguments: Any) -> Towers:
    """Returns the cost of a forward pass in training on batches; the vocabulary head computes labelled tokens only."""
    cost = partial(forward_flops, builder, training=True, **arguments)
    totals = []
    for batch in batches:
        read, b = cost(text_length=batch.ids.shape[1]), len(batch.ids)
        head = batch.num_labels * cost(text_length=1).head
        totals.append(Towers(b * read.vision, b * read.poolers, b * read.text, b * read.multimodal, head))
    return Towers(*map(sum, zip(*totals, strict=True)))


def decoding_bytes(model: CoCa) -> int:
    """Returns the bytes of the weights that each token of a caption reads: the decoders without the keys and values of
    the image, and the head.
    """
    layers = [*blocks(model.text_decoder), model.multimodal_decoder]
    weights = [named for layer in layers for named in layer.named_parameters()]
    return sum(weight.nbytes for name, weight in weights if ".cross_attention.kv." not in f".{name}")


def training_flops(builder: Callable[..., CoCa], *, text_length: int | None = None, **arguments: Any) -> int:
    """Compute the FLOPs of one training sample: a forward pass, and a backward pass of twice as many.

    A product has one more product for the gradient of each factor, but the pixels need no gradient. Recomputation is
    not counted: that of towers and poolers in GradCache with several micro-batches, that of blocks with activation
    checkpointing, and that of the scores in the backward pass of fused attention. Raises as `forward_flops` does.
    """
    forward = forward_flops(builder, text_length=text_length, training=True, **arguments)
    return 3 * forward.total - _pixels(builder, arguments)


def step_flops(builder: Callable[..., CoCa], batches: Sequence[Batch], **arguments: Any) -> int:
    """Compute the FLOPs that a training step on batches needs, as `training_flops` counts them.

    The vocabulary head is counted for labelled tokens only, without those that fill a batch; the products of embeddings
    in the contrastive loss are not counted.
    """
    images = sum(len(batch.ids) for batch in batches)
    return 3 * batch_flops(builder, batches, **arguments).total - images * _pixels(builder, arguments)


def _pixels(builder: Callable[..., CoCa], arguments: dict[str, Any]) -> int:
    """Returns the FLOPs that the gradient of an image's pixels would take: those of the patch embedding."""
    bound = inspect.signature(builder).bind(**arguments)
    bound.apply_defaults()
    size, patch_size, dim = (bound.arguments[name] for name in ("image_size", "patch_size", "dim"))
    return _linear((size // patch_size) ** 2, 3 * patch_size**2, dim)


def _linear(rows: int, dim: int, out: int) -> int:
    return 2 * rows * dim * out


def _attention(s: int, t: int, d: int) -> int:
    """FLOPs of s tokens that attend to t: projections of queries, output, keys and values, scores, weighted sums."""
    return 2 * _linear(s, d, d) + 2 * _linear(t, d, d) + 2 * _linear(s, d, t)


def _pooler(n: int, t: int, d: int) -> int:
    """FLOPs of n learned queries, which are not projected, that attend to t."""
    return _attention(n, t, d) - _linear(n, d, d)


def _feed_forward(s: int, d: int, hidden: int, kind: str) -> int:
    return (2 if kind == "mlp" else 3) * _linear(s, d, hidden)
