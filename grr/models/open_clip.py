"""Contrastive captioners of open_clip (Ilharco et al. 2021), built from the primitives of this library.

They differ from the CoCa of the paper. The ViT has a class token. There is one pooler, whose queries are normalised and
projected; the first of its 256 vectors is the image embedding, and captions attend to the others. The vector at CLS is
normalised and projected. In the multimodal decoder, blocks of self-attention and of cross-attention alternate, each
with an MLP. `grr.inference.convert` converts checkpoints of open_clip to these models.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grr.components import (
    Block,
    BlockCache,
    ClassToken,
    CrossAttention,
    CrossAttentionPooler,
    FeedForward,
    LayerNorm,
    LearnedPositions,
    PatchEmbedding,
    SelfAttention,
)
from grr.models.coca import CoCa, LogitScale, MultimodalDecoder, TextDecoder, VisionTransformer, split_keys
from grr.models.sizes import check_sizes


def open_clip_coca(
    *,
    vocab_size: int = 49_409,
    context_length: int = 77,
    image_size: int = 224,
    patch_size: int = 32,
    vision_dim: int = 768,
    vision_heads: int = 12,
    vision_layers: int = 12,
    num_queries: int = 256,
    pooler_heads: int = 8,
    dim: int = 512,
    num_heads: int = 8,
    text_layers: int = 12,
    multimodal_layers: int = 12,
    correct_cls_mask: bool = False,
    dropout: float = 0.0,
    temperature: float = 0.07,
) -> CoCa:
    """Build open_clip's CoCa; the defaults are its ViT-B/32.

    `dim` is the width of text, pooled vectors and embeddings. `vocab_size` and `context_length` include CLS, which
    open_clip stores separately: 49,408 + 1 ids and 76 + 1 tokens; the head has no weights for it. With
    `correct_cls_mask`, CLS attends to the caption and not to padding. That is correct and faster on short captions, but
    the released weights were trained otherwise (see `PaddedTextDecoder`). Images are normalised with the constants of
    this library; the converter adds the difference from CLIP's constants to the patch embedding, which does not have a
    bias in open_clip. Raises ValueError if image_size is not a multiple of patch_size, a width of its
    heads, or a size is not a positive int.
    """
    check_sizes("open_clip_coca", locals())
    if image_size % patch_size:
        raise ValueError(
            f"open_clip_coca: image_size must be a multiple of patch_size, got {image_size=}, {patch_size=}"
        )
    num_patches = (image_size // patch_size) ** 2
    decoder = TextDecoder if correct_cls_mask else PaddedTextDecoder
    patch_attention = CrossAttention(dim, pooler_heads, context_dim=vision_dim, context_norm=LayerNorm(vision_dim))
    return CoCa(
        vision_encoder=VisionTransformer(
            patches=PatchEmbedding(vision_dim, patch_size),
            class_token=ClassToken(vision_dim),
            positions=LearnedPositions(vision_dim, num_patches + 1),
            norm=LayerNorm(vision_dim),
            blocks=(_block(vision_dim, vision_heads, causal=False, dropout=dropout) for _ in range(vision_layers)),
            dropout=dropout,
        ),
        generative_pooler=nn.Sequential(
            CrossAttentionPooler(dim, num_queries, norm=LayerNorm(dim), attention=patch_attention),
            LayerNorm(dim),
        ),
        contrastive_pooler=FirstVector(dim),
        text_decoder=decoder(
            embedding=nn.Embedding(vocab_size, dim),
            positions=LearnedPositions(dim, context_length),
            blocks=(_block(dim, num_heads, causal=True, dropout=dropout) for _ in range(text_layers)),
            dropout=dropout,
        ),
        text_projection=nn.Sequential(LayerNorm(dim), nn.Linear(dim, dim, bias=False)),
        multimodal_decoder=MultimodalDecoder(
            blocks=_alternating_blocks(dim, num_heads, multimodal_layers, dropout),
            norm=LayerNorm(dim),
            head=HeadWithoutLast(dim, vocab_size),
        ),
        logit_scale=LogitScale(temperature=temperature, learned=True),
    )


def open_clip_coca_vit_b_32(
    *,
    vocab_size: int = 49_409,
    context_length: int = 77,
    image_size: int = 224,
    patch_size: int = 32,
    vision_dim: int = 768,
    vision_heads: int = 12,
    vision_layers: int = 12,
    num_queries: int = 256,
    pooler_heads: int = 8,
    dim: int = 512,
    num_heads: int = 8,
    text_layers: int = 12,
    multimodal_layers: int = 12,
    correct_cls_mask: bool = False,
    dropout: float = 0.0,
    temperature: float = 0.07,
) -> CoCa:
    """Build open_clip's coca_ViT-B-32: 253.6 M parameters.

    Released as laion2b_s13b_b90k, and fine-tuned on COCO as mscoco_finetuned_laion2b_s13b_b90k.
    Raises ValueError as `open_clip_coca` does.
    """
    return open_clip_coca(**locals())


def open_clip_coca_vit_l_14(
    *,
    vocab_size: int = 49_409,
    context_length: int = 77,
    image_size: int = 224,
    patch_size: int = 14,
    vision_dim: int = 1024,
    vision_heads: int = 16,
    vision_layers: int = 24,
    num_queries: int = 256,
    pooler_heads: int = 8,
    dim: int = 768,
    num_heads: int = 12,
    text_layers: int = 12,
    multimodal_layers: int = 12,
    correct_cls_mask: bool = False,
    dropout: float = 0.0,
    temperature: float = 0.07,
) -> CoCa:
    """Build open_clip's coca_ViT-L-14: 638.5 M parameters.

    Released as laion2b_s13b_b90k, and fine-tuned on COCO as mscoco_finetuned_laion2b_s13b_b90k.
    Raises ValueError as `open_clip_coca` does.
    """
    return open_clip_coca(**locals())


OPEN_CLIP_MODELS: dict[str, Callable[..., CoCa]] = {
    "open_clip_coca": open_clip_coca,
    "open_clip_coca_vit_b_32": open_clip_coca_vit_b_32,
    "open_clip_coca_vit_l_14": open_clip_coca_vit_l_14,
}


class PaddedTextDecoder(TextDecoder):
    """Unimodal decoder with open_clip's padding mask, a fault that its released weights were trained with.

    The mask is shifted by one token: a token is masked if the token before it is PAD. So CLS attends to the first PAD
    after the caption, and to itself only if the caption leaves no room for PAD. Generated captions do not depend on it.
    ids, positions: as in `TextDecoder`; right-padded rows are returned to the tokenizer's layout, with the same result.
    Source: open_clip 3.3, transformer.py, which has the correct mask as an option, `correct_cls_mask`, that none of its
    released configurations sets.
    """

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        caches: Sequence[BlockCache | None] | None = None,
        sample_keys: Tensor | None = None,
    ) -> Tensor:
        if caches is not None:  # during generation, ids contain neither PAD nor CLS
            return super().forward(ids, positions=positions, caches=caches)
        assert isinstance(self.positions, LearnedPositions)
        if positions is not None:
            positions = positions.expand_as(ids)
            rows = ids.new_full((len(ids), len(self.positions.weight)), self.pad_id).scatter(1, positions, ids)
            x = self(rows, sample_keys=sample_keys)  # [b, context, d]
            return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = self.embedding(ids)  # [b, s, d]
        index = torch.arange(ids.shape[1], device=ids.device)  # [s]
        entry_keys, block_keys = split_keys(sample_keys, index, self.blocks, x)
        x = self.dropout(x + self.positions(index).to(x.dtype), entry_keys)
        visible = F.pad(ids[:, :-1] != self.pad_id, (1, 0), value=True)  # [b, s]
        for block, keys in zip(self.blocks, block_keys, strict=True):
            x = block(x, mask=visible[:, None, None], **keys)
        return x


class FirstVector(nn.Module):
    """Linear projection of the first vector, without a bias: [b, n, d] -> [b, 1, d]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x[:, :1])


class NormOfTheRest(LayerNorm):
    """LayerNorm of all vectors but the first, which is dropped: [b, n, d] -> [b, n - 1, d]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 1:])


class HeadWithoutLast(nn.Linear):
    """Vocabulary head without bias, in which the logit of the last id, CLS, is minus infinity: [..., d] -> [..., v]."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size - 1, bias=False)
        self.out_features = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(x), (0, 1), value=-torch.inf)


def _block(dim: int, num_heads: int, *, causal: bool, dropout: float) -> Block:
    return Block(
        attention_norm=LayerNorm(dim),
        attention=SelfAttention(dim, num_heads, causal=causal),
        feed_forward_norm=LayerNorm(dim),
        feed_forward=FeedForward(dim, 4 * dim),
        dropout=dropout,
    )


def _alternating_blocks(dim: int, num_heads: int, num_layers: int, dropout: float) -> Iterator[Block]:
    """Yield pairs of blocks: self-attention over the text, then cross-attention to the image."""
    for _ in range(num_layers):
        yield _block(dim, num_heads, causal=True, dropout=dropout)
        yield Block(
            cross_attention_norm=LayerNorm(dim),
            cross_attention=CrossAttention(dim, num_heads, context_norm=NormOfTheRest(dim)),
            feed_forward_norm=LayerNorm(dim),
            feed_forward=FeedForward(dim, 4 * dim),
            dropout=dropout,
        )
