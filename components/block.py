"""The pre-norm transformer block, given its parts."""

from typing import NamedTuple

from torch import Tensor, nn

from .attention import KeyValueCache


class BlockCache(NamedTuple):
    """What one block remembers between the tokens of a caption: its own keys and values, and the context's."""

    tokens: KeyValueCache
    context: KeyValueCache


class Block(nn.Module):
    """Attention, then optionally attention to a context, then a feed-forward network, each on normalised input.

    x: [b, s, d], positions: as the attention takes them, context: [b, t, d] -> [b, s, d]. Every branch is added to the
    residual stream through dropout, and nothing else is dropped. The parts may be any modules of these signatures:
    attention(x, positions=, cache=), cross_attention(x, context, cache=), feed_forward(x), norms(x). Raises ValueError
    if only one of cross_attention and its norm is given.
    """

    def __init__(self, *, attention_norm: nn.Module, attention: nn.Module, feed_forward_norm: nn.Module,
                 feed_forward: nn.Module, cross_attention_norm: nn.Module | None = None,
                 cross_attention: nn.Module | None = None, dropout: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        if (cross_attention is None) != (cross_attention_norm is None):
            only = "cross_attention" if cross_attention_norm is None else "cross_attention_norm"
            raise ValueError(f"Block: cross_attention and cross_attention_norm come together, got only {only}")
        self.attention_norm, self.attention = attention_norm, attention
        self.cross_attention_norm, self.cross_attention = cross_attention_norm, cross_attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, positions: Tensor | None = None, context: Tensor | None = None,
                cache: BlockCache | None = None) -> Tensor:  # fmt: skip
        tokens = cache.tokens if cache else None
        x = x + self.dropout(self.attention(self.attention_norm(x), positions=positions, cache=tokens))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            seen = cache.context if cache else None
            x = x + self.dropout(self.cross_attention(self.cross_attention_norm(x), context, cache=seen))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
