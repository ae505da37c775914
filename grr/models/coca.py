"""Contrastive captioner: three towers and two poolers, connected as in CoCa (Yu et al. 2022, figure 2)."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grr.components import (
    AttentionPooler,
    Block,
    BlockCache,
    ClassToken,
    CrossAttention,
    Dropout,
    DropoutKeys,
    KeyValueCache,
    LearnedPositions,
    PatchDropout,
    PatchEmbedding,
    dropout_keys,
    fold_in,
    shared_rotations,
)
from grr.data.collate import IGNORE, right_pad, undo_right_pad
from grr.data.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from grr.models.head import at_least_float32, token_losses

VISION, TEXT, MULTIMODAL, CLASSIFIER = range(4)  # folded into a sample's dropout key, so that parts draw differently


class VisionTransformer(nn.Module):
    """Vision encoder: patch embedding and blocks, without a final norm.

    images: float [b, 3, height, width] -> [b, p, d]. Rotary positions of the blocks are the raster index of a patch
    (axes=1) or its row and column (axes=2); `positions`, if given, adds a vector per raster index before the blocks. A
    class token precedes the patches: p counts it, and its index is 0. `norm` is applied before the first block. In
    training, patch_dropout leaves out that fraction of the patches (`PatchDropout`), and p counts those that are kept.
    sample_keys: int64 [b], dropout keys of the images; without them, dropout is drawn from torch's generator.
    Raises ValueError for a class token with axes=2, for images that are not floats (bytes that were not normalised),
    and for images with more patches than learned positions.
    """

    def __init__(
        self,
        *,
        patches: PatchEmbedding,
        blocks: Iterable[Block],
        positions: nn.Module | None = None,
        class_token: ClassToken | None = None,
        norm: nn.Module | None = None,
        axes: int = 1,
        dropout: float = 0.0,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if class_token is not None and axes == 2:
            raise ValueError(
                "VisionTransformer: a class token does not have a row and a column, got class_token and axes=2; "
                "remove one of them"
            )
        self.axes = axes
        self.patches = patches
        self.class_token = class_token or nn.Identity()
        self.positions = positions
        self.norm = norm or nn.Identity()
        self.patch_dropout = PatchDropout(patch_dropout, num_fixed=0 if class_token is None else 1)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor, *, sample_keys: Tensor | None = None) -> Tensor:
        if not images.is_floating_point():
            raise ValueError(
                f"VisionTransformer: images must be normalised floats, got {images.dtype}; "
                "convert bytes with grr.data.images.normalize"
            )
        x = self.class_token(self.patches(images))  # [b, p, d]
        raster = torch.arange(x.shape[1], device=x.device)  # [p]
        if isinstance(self.positions, LearnedPositions) and len(raster) > len(self.positions.weight):
            raise ValueError(
                f"VisionTransformer: images must have at most {len(self.positions.weight)} tokens, one per learned "
                f"position, got {len(raster)} in {images.shape[-2]} x {images.shape[-1]} pixels; resize the images, or "
                "build the encoder with sinusoidal or rotary positions"
            )
        if self.positions is not None:
            x = x + self.positions(raster).to(x.dtype)
        x, raster = self.patch_dropout(x, raster, keys=sample_keys)  # in training, perhaps [b, k, d] and [b, k]
        entry_keys, block_keys = split_keys(sample_keys, raster, self.blocks, x)
        x = self.dropout(self.norm(x), entry_keys)
        columns = images.shape[-1] // self.patches.patch_size
        rotary = raster if self.axes == 1 else torch.stack((raster // columns, raster % columns), dim=-1)  # [..., 2]
        for block, at, keys in zip(self.blocks, shared_rotations(self.blocks, rotary), block_keys, strict=True):
            x = block(x, positions=at, **keys)
        return x


class TextDecoder(nn.Module):
    """Unimodal text decoder of CoCa: token embeddings and causal blocks, without attention to the image.

    ids: [b, s] -> [b, s, d]. Without positions, ids have the layout of the tokenizer, and padding is masked for all
    later tokens. With positions [s] or [b, s], ids are right-padded. `norm` is applied after the last block.
    sample_keys: int64 [b], dropout keys of the texts; without them, dropout is drawn from torch's generator.
    """

    def __init__(
        self,
        *,
        embedding: nn.Embedding,
        blocks: Iterable[Block],
        positions: nn.Module | None = None,
        norm: nn.Module | None = None,
        pad_id: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = embedding
        self.positions = positions
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        caches: Sequence[BlockCache | None] | None = None,
        sample_keys: Tensor | None = None,
    ) -> Tensor:
        if positions is None:
            ids, positions = right_pad(ids, pad_id=self.pad_id)
            return undo_right_pad(self(ids, positions=positions, sample_keys=sample_keys), positions)
        x = self.embedding(ids)  # [b, s, d]
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        entry_keys, block_keys = split_keys(sample_keys, positions, self.blocks, x)
        x = self.dropout(x, entry_keys)
        rotations, caches = shared_rotations(self.blocks, positions), caches or [None] * len(self.blocks)
        for block, at, cache, keys in zip(self.blocks, rotations, caches, block_keys, strict=True):
            x = block(x, positions=at, cache=cache, **keys)
        return self.norm(x)


class MultimodalDecoder(nn.Module):
    """Multimodal decoder: causal blocks that also attend to the image, a final norm, and the vocabulary head.

    text: [b, s, d], context: [b, n, d], positions: [s] or [b, s] -> [b, s, d], the input of `head` -> [b, s, v].
    sample_keys: int64 [b], dropout keys of the samples; without them, dropout is drawn from torch's generator.
    Rows must be right-padded: the causal mask is the only mask.
    """

    def __init__(self, *, blocks: Iterable[Block], norm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head

    def forward(
        self,
        text: Tensor,
        context: Tensor,
        *,
        positions: Tensor | None = None,
        caches: Sequence[BlockCache | None] | None = None,
        sample_keys: Tensor | None = None,
    ) -> Tensor:
        if positions is None:
            positions = torch.arange(text.shape[1], device=text.device)
        x = text
        _, block_keys = split_keys(sample_keys, positions, self.blocks, x)
        rotations, caches = shared_rotations(self.blocks, positions), caches or [None] * len(self.blocks)
        for block, at, cache, keys in zip(self.blocks, rotations, caches, block_keys, strict=True):
            x = block(x, positions=at, context=context, cache=cache, **keys)
        return self.norm(x)


class LogitScale(nn.Module):
    """Scale and bias of cosine similarities: 1 / temperature, and a constant that is added.

    Both are constant, as in the paper's presets, or learned; a learned scale is clamped to 100 (CLIP, section 2.5). The
    bias is for the sigmoid loss (SigLIP starts at -10). Shapes are [1] because FSDP2 cannot shard a scalar.
    """

    def __init__(self, *, temperature: float = 0.07, bias: float = 0.0, learned: bool = False) -> None:
        super().__init__()
        if not isinstance(temperature, SupportsFloat) or not 0 < temperature < math.inf:
            raise ValueError(
                f"LogitScale: temperature must be positive and finite, got {temperature=}; the paper has 0.07"
            )
        self.temperature, self.initial_bias, self.learned = temperature, bias, learned
        if learned:
            self.log_scale = nn.Parameter(torch.empty(1))
            self.bias = nn.Parameter(torch.empty(1))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.learned:
            nn.init.constant_(self.log_scale, -math.log(self.temperature))
            nn.init.constant_(self.bias, self.initial_bias)

    def forward(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.learned:
            return at_least_float32(self.log_scale).exp().clamp(max=100.0), at_least_float32(self.bias)
        return torch.full((1,), 1 / self.temperature, device=device), torch.full((1,), self.initial_bias, device=device)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}" + (", learned" if self.learned else "")


class CoCaOutput(NamedTuple):
    """Output of a forward pass: token_losses if labels were given, else logits.

    In a float64 model, the float32 tensors are float64.
    """

    image_embeddings: Tensor  # float32 [b, e], unit length
    text_embeddings: Tensor  # float32 [b, e], unit length
    scale: Tensor  # float32 [1], 1 / temperature
    bias: Tensor  # float32 [1]
    logits: Tensor | None = None  # [b, s, v]
    token_losses: Tensor | None = None  # float32 [number of labels]; 0 where a label is IGNORE


class CoCa(nn.Module):
    """Image -> vision encoder -> generative pooler -> contrastive pooler -> image embedding;
    text -> unimodal decoder -> vector at CLS -> text embedding; both -> multimodal decoder -> next tokens.

    images: uint8 [b, 3, h, w], or normalised float of that shape; ids: [b, s] -> CoCaOutput. The vision encoder may be
    any module that maps images to [b, p, d], the text decoder any that maps ids to [b, s, d]; to train on trimmed
    batches (`collate_captions`), its forward must take `positions=`. The contrastive pooler maps [b, n, d] to
    [b, 1, e]; if e is not d, `text_projection` maps the vector at CLS to it. With text_vector="eos", texts are embedded
    by the vector at the token before CLS, which is EOS, and nothing depends on CLS.

    labels: int64 [n] of the tokens at label_places [n], row * s + column, and cls_places [b], the column of CLS, as
    `collate_captions` returns them: then no operation waits for the device. Without label_places, labels are [b, m], of
    the first m <= s tokens. With labels, the vocabulary head runs on labelled positions only, in chunks, so that the
    logits are never all in memory. Without cls_places, CLS is the last token that is not PAD.
    sample_keys: int64 [b], a key per sample that decides its dropout in any batch; a tower whose forward does not take
    sample_keys draws from torch's generator. Raises ValueError if the output of the vision encoder is not [b, p, d].
    """

    token_losses = staticmethod(token_losses)  # `parallelize` replaces it by a compiled one
    built_by: tuple[str, dict[str, Any]] | None = None  # the name and arguments that `create_model` built it from

    def __init__(
        self,
        *,
        vision_encoder: nn.Module,
        generative_pooler: nn.Module,
        contrastive_pooler: nn.Module,
        text_decoder: nn.Module,
        multimodal_decoder: MultimodalDecoder,
        logit_scale: LogitScale | None = None,
        pooler_norm: nn.Module | None = None,
        text_projection: nn.Module | None = None,
        text_vector: Literal["cls", "eos"] = "cls",
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.pad_id, self.text_vector = pad_id, text_vector
        self.vision_encoder = vision_encoder
        self.pooler_norm = pooler_norm or nn.Identity()
        self.generative_pooler = generative_pooler
        self.contrastive_pooler = contrastive_pooler
        self.text_decoder = text_decoder
        self.text_projection = text_projection or nn.Identity()
        self.multimodal_decoder = multimodal_decoder
        self.logit_scale = logit_scale or LogitScale()

    @property
    def dim(self) -> int:
        """Width d of the text vectors and image vectors that the multimodal decoder reads."""
        return self.multimodal_decoder.head.in_features

    @property
    def pooler_heads(self) -> int:
        """Number of heads of the generative pooler; task poolers use the same."""
        poolers = (AttentionPooler, CrossAttention)
        return next(part.num_heads for part in self.generative_pooler.modules() if isinstance(part, poolers))

    def forward(
        self,
        images: Tensor,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        label_places: Tensor | None = None,
        cls_places: Tensor | None = None,
        sample_keys: Tensor | None = None,
    ) -> CoCaOutput:
        context = self._context(images, sample_keys)
        return self._decode(context, ids, positions, labels, label_places, cls_places, sample_keys)

    def embed(
        self,
        images: Tensor,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        cls_places: Tensor | None = None,
        sample_keys: Tensor | None = None,
    ) -> CoCaOutput:
        """Compute the embeddings of `forward`, without logits and losses.

        Dropout is drawn as in `forward`, so that a later forward pass computes the same embeddings (for GradCache).
        """
        context = self._context(images, sample_keys)
        return self._output(context, self._text(ids, positions, sample_keys), ids, cls_places)

    def image_context(self, images: Tensor) -> Tensor:
        """Compute the image vectors that the multimodal decoder attends to: images -> [b, n, d]."""
        return self._context(images)

    def from_context(
        self,
        context: Tensor,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        label_places: Tensor | None = None,
        cls_places: Tensor | None = None,
    ) -> CoCaOutput:
        """Compute `forward` from an `image_context`, which can be repeated for each caption of an image."""
        return self._decode(context, ids, positions, labels, label_places, cls_places)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images: uint8 or normalised float [b, 3, h, w] -> float32 [b, e], unit length."""
        return self._image_embeddings(self._context(images))

    def encode_text(self, ids: Tensor, *, positions: Tensor | None = None) -> Tensor:
        """Embed texts: ids [b, s], in which CLS is the last token that is not PAD -> float32 [b, e], unit length."""
        return self._text_embeddings(self._text(ids, positions), ids)

    def caches(self, context_length: int, max_length: int) -> tuple[list[BlockCache], list[BlockCache]]:
        """Returns empty caches for the two decoders, for captions of up to max_length tokens."""

        def empty(decoder: nn.Module) -> list[BlockCache]:
            blocks = [module for module in decoder.modules() if isinstance(module, Block)]
            return [BlockCache(KeyValueCache(max_length), KeyValueCache(context_length)) for _ in blocks]

        return empty(self.text_decoder), empty(self.multimodal_decoder)

    def next_token_logits(
        self, ids: Tensor, context: Tensor, *, positions: Tensor, caches: tuple[list[BlockCache], list[BlockCache]]
    ) -> Tensor:
        """Compute the logits of the next token: ids [b, s], which follow those in the caches -> [b, v].

        Consecutive rows may be n captions of one image that share a row of the context: ids [b n, s] -> [b n, v].
        """
        text = self.text_decoder(ids, positions=positions, caches=caches[0])
        hidden = self.multimodal_decoder(text, context, positions=positions, caches=caches[1])
        return self.multimodal_decoder.head(hidden[:, -1])

    # The public methods above do not call each other, because FSDP2 wraps each as a separate entry point.

    def _context(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        patches = encode_pixels(self.vision_encoder, images, sample_keys)  # [b, p, d]
        if patches.ndim != 3:
            raise ValueError(
                f"CoCa: vision_encoder must map images to [b, p, d], got {list(patches.shape)} of "
                f"{len(images)} images; flatten rows and columns into p, and put d last"
            )
        return self.generative_pooler(self.pooler_norm(patches))

    def _text(self, ids: Tensor, positions: Tensor | None, sample_keys: Tensor | None = None) -> Tensor:
        keys = tower_keys(self.text_decoder, sample_keys, TEXT)
        given = {} if positions is None else {"positions": positions}  # an encoder may not take positions
        return self.text_decoder(ids, **given, **keys)

    def _decode(
        self,
        context: Tensor,
        ids: Tensor,
        positions: Tensor | None,
        labels: Tensor | None,
        label_places: Tensor | None,
        cls_places: Tensor | None,
        sample_keys: Tensor | None = None,
    ) -> CoCaOutput:
        text = self._text(ids, positions, sample_keys)  # [b, s, d]
        keys = tower_keys(self.multimodal_decoder, sample_keys, MULTIMODAL)
        output = self._output(context, text, ids, cls_places)
        hidden = self.multimodal_decoder(text, context, positions=positions, **keys)  # [b, s, d]
        if labels is None:
            return output._replace(logits=self.multimodal_decoder.head(hidden))  # [b, s, v]
        if label_places is None:
            labelled = F.pad(labels, (0, ids.shape[1] - labels.shape[1]), value=IGNORE).flatten()  # [b s]
            label_places = (labelled != IGNORE).nonzero().squeeze(1)  # [n]
            labels = labelled[label_places]
        tokens = hidden.flatten(0, 1).index_select(0, label_places)  # [n, d]
        return output._replace(token_losses=self.token_losses(tokens, labels, self.multimodal_decoder.head))

    def _output(self, context: Tensor, text: Tensor, ids: Tensor, cls_places: Tensor | None) -> CoCaOutput:
        embeddings = self._image_embeddings(context), self._text_embeddings(text, ids, cls_places)
        return CoCaOutput(*embeddings, *self.logit_scale(ids.device))

    def _image_embeddings(self, context: Tensor) -> Tensor:
        return F.normalize(at_least_float32(self.contrastive_pooler(context)[:, 0]), dim=-1)

    def _text_embeddings(self, text: Tensor, ids: Tensor, cls_places: Tensor | None = None) -> Tensor:
        """Embed the vector at CLS, the last token that is not PAD in both layouts, or at EOS, the one before it.

        cls_places: of right-padded ids, so that EOS is in the column before.
        """
        b, s = ids.shape
        if cls_places is None:
            columns = torch.arange(s, device=ids.device).expand_as(ids).masked_fill(ids == self.pad_id, -1)
            places = columns.argmax(dim=1)
            if self.text_vector == "eos":
                places = columns.scatter(1, places.unsqueeze(1), -1).argmax(dim=1)
        else:
            places = cls_places - 1 if self.text_vector == "eos" else cls_places
        rows = torch.arange(0, b * s, s, device=ids.device)
        at_places = text.flatten(0, 1).index_select(0, rows + places)  # [b, d]
        return F.normalize(at_least_float32(self.text_projection(at_places)), dim=-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode for the block; then restore the mode of each module, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def encode_pixels(encoder: nn.Module, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
    """Normalise images, cast them to the dtype of the encoder (for example bfloat16), and encode them."""
    mean, std = image_statistics(encoder)
    x = normalize(images, mean=mean, std=std)
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), x.dtype)
    return encoder(x.to(dtype), **tower_keys(encoder, sample_keys, VISION))


def image_statistics(encoder: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of the RGB images that an encoder reads: its own, or else ImageNet's."""
    return getattr(encoder, "image_mean", IMAGENET_MEAN), getattr(encoder, "image_std", IMAGENET_STD)


def tower_keys(tower: nn.Module, sample_keys: Tensor | None, number: int) -> dict[str, Tensor]:
    """Returns the keyword argument sample_keys of a tower, different for each number; empty if it takes none."""
    if sample_keys is None or not _takes(type(tower).forward, "sample_keys"):
        return {}
    return {"sample_keys": fold_in(sample_keys, torch.full_like(sample_keys, number))}


def split_keys(
    sample_keys: Tensor | None, positions: Tensor, blocks: Iterable[nn.Module], x: Tensor
) -> tuple[DropoutKeys | None, list[dict[str, Any]]]:
    """Returns the dropout keys of the input of the blocks, x [b, s, d], and the keyword arguments of each block."""
    forwards = [type(block).forward for block in blocks]
    if sample_keys is None:
        return None, [{} for _ in forwards]
    rows, columns = dropout_keys(sample_keys, positions, 1 + 3 * len(forwards), x.shape[-1])
    arguments = [
        {"dropout_keys": DropoutKeys(own, columns)} if _takes(forward, "dropout_keys") else {}
        for forward, own in zip(forwards, rows[1:].split(3), strict=True)
    ]
    return DropoutKeys(rows[0], columns), arguments


@functools.cache
def _takes(forward: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(forward).parameters
