"""The pre-norm transformer block, composed of the modules that are passed to it."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from .attention import KeyValueCache, SelfAttention
from .dropout import Dropout, DropoutKeys
from .rotary import AxialRotaryEmbedding, MixedRotaryEmbedding, RotaryEmbedding, Rotation


class BlockCache(NamedTuple):
    """Keys and values that one block stores during generation: those of the tokens and those of the context."""

    tokens: KeyValueCache
    context: KeyValueCache


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention, or both in this order; then a feed-forward network.

    x: [b, s, d], positions and mask: as the attention takes them, context: [b, t, c] -> [b, s, d]. Each branch is
    added to the residual stream after dropout, and nothing else is dropped; dropout_keys, of rows [3, b, s], determine
    the masks of the three branches in this order. The parts may be any modules of these signatures:
    attention(x, positions=, cache=), with mask= where the block is called with one,
    cross_attention(x, context, cache=), feed_forward(x), norms(x). Raises ValueError if an attention is passed without
    its norm, a norm without its attention, or neither attention.
    """

    def __init__(
        self,
        *,
        attention_norm: nn.Module | None = None,
        attention: nn.Module | None = None,
        feed_forward_norm: nn.Module,
        feed_forward: nn.Module,
        cross_attention_norm: nn.Module | None = None,
        cross_attention: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        given = {
            "attention": attention,
            "attention_norm": attention_norm,
            "cross_attention": cross_attention,
            "cross_attention_norm": cross_attention_norm,
        }
        for name in ("attention", "cross_attention"):
            if (given[name] is None) != (given[f"{name}_norm"] is None):
                only = name if given[name] is not None else f"{name}_norm"
                raise ValueError(f"Block: {name} and {name}_norm must be passed together, got only {only}")
        if attention is None and cross_attention is None:
            raise ValueError("Block: pass attention, cross_attention, or both, each with its norm; got neither")
        self.attention_norm, self.attention = attention_norm, attention
        self.cross_attention_norm, self.cross_attention = cross_attention_norm, cross_attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | Rotation | None = None,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        cache: BlockCache | None = None,
        dropout_keys: DropoutKeys | None = None,
    ) -> Tensor:
        keys: list[DropoutKeys | None] = [None] * 3
        if dropout_keys is not None:
            keys = [DropoutKeys(rows, dropout_keys.columns) for rows in dropout_keys.rows.unbind()]
        if self.attention is not None and self.attention_norm is not None:
            inputs = {"positions": positions, "cache": cache.tokens if cache else None}
            if mask is not None:
                inputs["mask"] = mask
            x = self.dropout(self.attention(self.attention_norm(x), **inputs), keys[0], residual=x)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            context_cache = cache.context if cache else None
            y = self.cross_attention(self.cross_attention_norm(x), context, cache=context_cache)
            x = self.dropout(y, keys[1], residual=x)
        return self.dropout(self.feed_forward(self.feed_forward_norm(x)), keys[2], residual=x)


def shared_rotations(blocks: Iterable[nn.Module], positions: Tensor) -> list[Tensor | Rotation]:
    """Returns the positions for each block: the `Rotation` of its angles, which blocks of one rotary embedding share.

    A block with another attention than `SelfAttention`, or with learned frequencies, which FSDP2 gathers only while the
    block runs, receives the positions themselves.
    """
    rotaries = [_rotary(block) for block in blocks]
    rotations = {rotary: Rotation(rotary.angles(positions)) for rotary in set(rotaries) if rotary is not None}
    return [positions if rotary is None else rotations[rotary] for rotary in rotaries]


def _rotary(block: nn.Module) -> RotaryEmbedding | AxialRotaryEmbedding | None:
    attention = getattr(block, "attention", None)
    rotary = attention.rotary if isinstance(attention, SelfAttention) else None
    return None if isinstance(rotary, MixedRotaryEmbedding) else rotary
