"""Primitives: torch modules that depend on torch and on each other, and on no other part of the library."""

if __name__ == "components":
    raise ImportError("import grr.components, not components: the folder is part of the package grr")

from .attention import CrossAttention, KeyValueCache, SelfAttention
from .block import Block, BlockCache, shared_rotations
from .class_token import ClassToken
from .dropout import Dropout, DropoutKeys, dropout_keys, fold_in
from .feed_forward import GEGLU, FeedForward, SwiGLU
from .lora import LoRALinear, adapter_parameters
from .norms import LayerNorm, RMSNorm
from .patch_dropout import PatchDropout, num_kept
from .patches import PatchEmbedding
from .pooler import AttentionPooler, CrossAttentionPooler
from .positions import LearnedPositions, SinusoidalPositions
from .recompute import call_without_keeping, recomputable
from .rotary import PAIRING, AxialRotaryEmbedding, MixedRotaryEmbedding, RotaryEmbedding, Rotation, rotate

__all__ = [
    "GEGLU",
    "PAIRING",
    "AttentionPooler",
    "AxialRotaryEmbedding",
    "Block",
    "BlockCache",
    "ClassToken",
    "CrossAttention",
    "CrossAttentionPooler",
    "Dropout",
    "DropoutKeys",
    "FeedForward",
    "KeyValueCache",
    "LayerNorm",
    "LearnedPositions",
    "LoRALinear",
    "MixedRotaryEmbedding",
    "PatchDropout",
    "PatchEmbedding",
    "RMSNorm",
    "RotaryEmbedding",
    "Rotation",
    "SelfAttention",
    "SinusoidalPositions",
    "SwiGLU",
    "adapter_parameters",
    "call_without_keeping",
    "dropout_keys",
    "fold_in",
    "num_kept",
    "recomputable",
    "rotate",
    "shared_rotations",
]
