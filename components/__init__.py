"""Primitives: plain torch modules that know nothing of images' contents, captions or training."""

if __name__ == "components":
    raise ImportError("import grr.components, not components: the folder is part of the package grr")

from .attention import CrossAttention, KeyValueCache, SelfAttention
from .block import Block, BlockCache
from .feed_forward import GEGLU, FeedForward
from .norms import LayerNorm, RMSNorm
from .patches import PatchEmbedding
from .pooler import AttentionPooler
from .positions import LearnedPositions, SinusoidalPositions
from .rotary import PAIRING, AxialRotaryEmbedding, MixedRotaryEmbedding, RotaryEmbedding, rotate

__all__ = [
    "GEGLU",
    "PAIRING",
    "AttentionPooler",
    "AxialRotaryEmbedding",
    "Block",
    "BlockCache",
    "CrossAttention",
    "FeedForward",
    "KeyValueCache",
    "LayerNorm",
    "LearnedPositions",
    "MixedRotaryEmbedding",
    "PatchEmbedding",
    "RMSNorm",
    "RotaryEmbedding",
    "SelfAttention",
    "SinusoidalPositions",
    "rotate",
]
