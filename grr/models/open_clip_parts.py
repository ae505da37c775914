"""Parts of open_clip's contrastive captioners that differ from those of the CoCa of the paper."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grr.components import (
    Block,
    BlockCache,
    CrossAttention,
    FeedForward,
    LayerNorm,
    LearnedPositions,
    RMSNorm,
    RotaryEmbedding,
    SelfAttention,
    SwiGLU,
)
from grr.models.coca import TextDecoder, split_keys


class PaddedTextDecoder(TextDecoder):
    """Unimodal decoder with open_clip's padding mask, a fault that its released weights were trained with.

    The mask is shifted by one token: a token is masked if the token before it is PAD. So CLS attends to the first PAD
    after the caption, and to itself only if the caption leaves no room for PAD. Generated captions do not depend on it.
    ids, positions: as in `TextDecoder`; right-padded rows are returned to the tokenizer's layout, with the same result.
    Source: open_clip 3.3, transformer.py, which has the correct mask as an option, `correct_cls_mask`, that no released
    weights were trained with.
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


class WithoutFirst(nn.Module):
    """Returns all vectors but the first: [b, n, d] -> [b, n - 1, d]."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:]


class HeadWithoutLast(nn.Linear):
    """Vocabulary head without bias, in which the logit of the last id, CLS, is minus infinity: [..., d] -> [..., v]."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size - 1, bias=False)
        self.out_features = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(x), (0, 1), value=-torch.inf)


def plain_block(dim: int, num_heads: int, *, causal: bool, dropout: float) -> Block:
    """Returns a block of self-attention and an MLP, as in CLIP (Radford et al. 2021)."""
    return Block(
        attention_norm=LayerNorm(dim),
        attention=SelfAttention(dim, num_heads, causal=causal),
        feed_forward_norm=LayerNorm(dim),
        feed_forward=FeedForward(dim, 4 * dim),
        dropout=dropout,
    )


def alternating_blocks(
    dim: int, num_heads: int, num_layers: int, *, image: Literal["all", "rest"], dropout: float
) -> Iterator[Block]:
    """Yield pairs of blocks: self-attention over the text, then cross-attention to the normalised image vectors.

    image: whether that is to all of them, or to all but the first.
    """
    context_norm = LayerNorm if image == "all" else NormOfTheRest
    for _ in range(num_layers):
        yield plain_block(dim, num_heads, causal=True, dropout=dropout)
        yield Block(
            cross_attention_norm=LayerNorm(dim),
            cross_attention=CrossAttention(dim, num_heads, context_norm=context_norm(dim)),
            feed_forward_norm=LayerNorm(dim),
            feed_forward=FeedForward(dim, 4 * dim),
            dropout=dropout,
        )


def modern_blocks(
    dim: int, num_heads: int, num_layers: int, *, image: Literal["none", "all", "rest"], dropout: float
) -> Iterator[Block]:
    """Yield causal blocks of RMSNorm, rotary positions, gated attention and SwiGLU, all without biases.

    image: whether cross-attention follows self-attention, to all image vectors, or to all but the first.
    """
    rotary = RotaryEmbedding(dim // num_heads)  # one module: its angles are computed once

    def cross_attention() -> CrossAttention:
        rest = WithoutFirst() if image == "rest" else None
        return CrossAttention(dim, num_heads, context_norm=rest, bias=False, gated=True)

    for _ in range(num_layers):
        yield Block(
            attention_norm=RMSNorm(dim),
            attention=SelfAttention(dim, num_heads, causal=True, rotary=rotary, bias=False, gated=True),
            cross_attention_norm=None if image == "none" else RMSNorm(dim),
            cross_attention=None if image == "none" else cross_attention(),
            feed_forward_norm=RMSNorm(dim),
            feed_forward=SwiGLU(dim, 4 * dim, bias=False),
            dropout=dropout,
        )
