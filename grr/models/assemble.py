"""General builders: a vision encoder, a text decoder and a contrastive captioner, assembled from the primitives.

`coca` describes every model of this family once. `grr.models.builders` gives names to its sizes and variants.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import nn

from grr.components import (
    GEGLU,
    AttentionPooler,
    AxialRotaryEmbedding,
    Block,
    CrossAttention,
    FeedForward,
    LayerNorm,
    LearnedPositions,
    MixedRotaryEmbedding,
    PatchEmbedding,
    RMSNorm,
    RotaryEmbedding,
    SelfAttention,
    SinusoidalPositions,
    SwiGLU,
)
from grr.components.attention import Rotary
from grr.models.coca import CoCa, LogitScale, MultimodalDecoder, TextDecoder, VisionTransformer
from grr.models.sizes import check_sizes

Norm = Literal["rmsnorm", "layernorm"]
FeedForwardKind = Literal["geglu", "swiglu", "mlp"]
Position = Literal["rope", "rope_2d", "rope_mixed", "sinusoidal", "learned"]
TextPosition = Literal["rope", "sinusoidal", "learned"]

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rmsnorm": RMSNorm,
    "layernorm": lambda dim: LayerNorm(dim, eps=1e-6),
}
FEED_FORWARDS: dict[str, Callable[[int, int], nn.Module]] = {"geglu": GEGLU, "swiglu": SwiGLU, "mlp": FeedForward}
ROTARIES: dict[str, Callable[[int, int], Rotary]] = {
    "rope": lambda head_dim, num_heads: RotaryEmbedding(head_dim),
    "rope_2d": lambda head_dim, num_heads: AxialRotaryEmbedding(head_dim),
    "rope_mixed": MixedRotaryEmbedding,
}
ABSOLUTES: dict[str, Callable[[int, int], nn.Module]] = {
    "sinusoidal": lambda dim, num_positions: SinusoidalPositions(dim),
    "learned": LearnedPositions,
}
MULTIPLIERS = {"geglu": 2.7, "swiglu": 2.7, "mlp": 4.0}  # hidden width / width at equal parameters (GRR-CoCa, table 1)
T5_VOCABULARY = 32_102  # 32,000 pieces, 100 sentinels, BOS, CLS


def vision_transformer(
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
    """Build a vision encoder; norm, feed-forward network and position encoding are chosen by name.

    `ffn_multiplier` None means 2.7 for GEGLU and SwiGLU and 4 for the MLP, which have the same number of parameters.
    `patch_dropout` is the fraction of the patches that training leaves out (`PatchDropout`).
    Raises ValueError if image_size is not a multiple of patch_size, dim of num_heads, a size is not a positive int,
    patch_dropout is not from 0 to below 1, or a name is not known.
    """
    check_sizes("vision_transformer", locals())
    if image_size % patch_size:
        raise ValueError(
            f"vision_transformer: image_size must be a multiple of patch_size, got {image_size=}, {patch_size=}"
        )
    _check_heads("vision_transformer", dim, num_heads)
    _check_names(
        "vision_transformer",
        norm=(norm, NORMS),
        feed_forward=(feed_forward, FEED_FORWARDS),
        position=(position, ROTARIES | ABSOLUTES),
    )
    hidden_dim = int((ffn_multiplier or MULTIPLIERS[feed_forward]) * dim)
    num_patches = (image_size // patch_size) ** 2

    learned = position == "rope_mixed"  # other rotary embeddings are one module, which computes its angles once
    shared = ROTARIES[position](dim // num_heads, num_heads) if position in ROTARIES and not learned else None

    def block() -> Block:
        rotary = MixedRotaryEmbedding(dim // num_heads, num_heads) if learned else shared
        return Block(
            attention_norm=NORMS[norm](dim),
            attention=SelfAttention(dim, num_heads, rotary=rotary, qk_norm=qk_norm),
            feed_forward_norm=NORMS[norm](dim),
            feed_forward=FEED_FORWARDS[feed_forward](dim, hidden_dim),
            dropout=dropout,
        )

    return VisionTransformer(
        patches=PatchEmbedding(dim, patch_size),
        positions=ABSOLUTES[position](dim, num_patches) if position in ABSOLUTES else None,
        blocks=(block() for _ in range(num_layers)),
        axes=2 if position in ("rope_2d", "rope_mixed") else 1,
        dropout=dropout,
        patch_dropout=patch_dropout,
    )


def _text_blocks(
    *,
    norm: Norm,
    feed_forward: FeedForwardKind,
    position: TextPosition,
    dim: int,
    num_heads: int,
    num_layers: int,
    ffn_multiplier: float,
    qk_norm: bool,
    dropout: float,
    cross_attention: bool,
) -> Iterator[Block]:
    """The causal blocks of the two text decoders, one by one: a copy would start all from the same random weights."""
    hidden_dim = int(ffn_multiplier * dim)
    rotary = (
        RotaryEmbedding(dim // num_heads) if position == "rope" else None
    )  # one module: its angles are computed once
    for _ in range(num_layers):
        yield Block(
            attention_norm=NORMS[norm](dim),
            attention=SelfAttention(dim, num_heads, causal=True, rotary=rotary, qk_norm=qk_norm),
            cross_attention_norm=NORMS[norm](dim) if cross_attention else None,
            cross_attention=CrossAttention(dim, num_heads, qk_norm=qk_norm) if cross_attention else None,
            feed_forward_norm=NORMS[norm](dim),
            feed_forward=FEED_FORWARDS[feed_forward](dim, hidden_dim),
            dropout=dropout,
        )


def text_decoder(
    *,
    norm: Norm = "rmsnorm",
    feed_forward: FeedForwardKind = "geglu",
    position: TextPosition = "rope",
    vocab_size: int = T5_VOCABULARY,
    context_length: int = 64,
    dim: int = 768,
    num_heads: int = 12,
    num_layers: int = 12,
    ffn_multiplier: float = 4.0,
    qk_norm: bool = False,
    dropout: float = 0.0,
) -> TextDecoder:
    """Build a unimodal text decoder: token embeddings and causal blocks. 138,038,784 parameters at the defaults.

    `context_length` is the number of tokens that learned absolute positions have room for. Raises ValueError if dim is
    not a multiple of num_heads, a size is not a positive int, or a name is not known.
    """
    check_sizes("text_decoder", locals())
    _check_heads("text_decoder", dim, num_heads)
    _check_names(
        "text_decoder",
        norm=(norm, NORMS),
        feed_forward=(feed_forward, FEED_FORWARDS),
        position=(position, {"rope": None, **ABSOLUTES}),
    )
    return TextDecoder(
        embedding=nn.Embedding(vocab_size, dim),
        positions=ABSOLUTES[position](dim, context_length) if position in ABSOLUTES else None,
        blocks=_text_blocks(
            norm=norm,
            feed_forward=feed_forward,
            position=position,
            dim=dim,
            num_heads=num_heads,
            num_layers=num_layers,
            ffn_multiplier=ffn_multiplier,
            qk_norm=qk_norm,
            dropout=dropout,
            cross_attention=False,
        ),
        dropout=dropout,
    )


def coca(
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
    """Build a contrastive captioner; every part of it that differs between the models of the paper is an argument.

    The first six choose norm, feed-forward network and positions of the vision encoder and of the text decoders.
    `context_length` is the longest caption in tokens, `num_queries` the number of queries of the generative pooler. The
    arguments from patch_dropout on leave the paper; they are off in all presets. Raises ValueError as the builders of
    the towers do, or if the temperature is not positive and finite.
    """
    check_sizes("coca", locals())
    vision_encoder = vision_transformer(
        norm=vision_norm,
        feed_forward=vision_feed_forward,
        position=vision_position,
        image_size=image_size,
        patch_size=patch_size,
        dim=dim,
        num_heads=num_heads,
        num_layers=vision_layers,
        ffn_multiplier=vision_ffn_multiplier,
        qk_norm=qk_norm,
        dropout=dropout,
        patch_dropout=patch_dropout,
    )
    return captioner(
        vision_encoder,
        pooler_norm=NORMS[vision_norm](dim) if pooler_norm else None,
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


def captioner(
    vision_encoder: nn.Module,
    *,
    pooler_norm: nn.Module | None,
    text_norm: Norm,
    text_feed_forward: FeedForwardKind,
    text_position: TextPosition,
    vocab_size: int,
    context_length: int,
    num_queries: int,
    dim: int,
    num_heads: int,
    text_layers: int,
    multimodal_layers: int,
    text_ffn_multiplier: float,
    dropout: float,
    qk_norm: bool,
    tied_embeddings: bool,
    temperature: float,
    logit_bias: float,
    learned_temperature: bool,
) -> CoCa:
    """Build poolers and text decoders around a vision encoder: arguments as in `coca`, and raises as it does.

    `pooler_norm` maps the output of the vision encoder to [b, p, dim], the input of the poolers; None: it is that.
    """
    unimodal = text_decoder(
        norm=text_norm,
        feed_forward=text_feed_forward,
        position=text_position,
        vocab_size=vocab_size,
        context_length=context_length,
        dim=dim,
        num_heads=num_heads,
        num_layers=text_layers,
        ffn_multiplier=text_ffn_multiplier,
        qk_norm=qk_norm,
        dropout=dropout,
    )
    multimodal = MultimodalDecoder(
        blocks=_text_blocks(
            norm=text_norm,
            feed_forward=text_feed_forward,
            position=text_position,
            dim=dim,
            num_heads=num_heads,
            num_layers=multimodal_layers,
            ffn_multiplier=text_ffn_multiplier,
            qk_norm=qk_norm,
            dropout=dropout,
            cross_attention=True,
        ),
        norm=NORMS[text_norm](dim),
        head=nn.Linear(dim, vocab_size),
    )
    if tied_embeddings:
        multimodal.head.weight = unimodal.embedding.weight
    return CoCa(
        vision_encoder=vision_encoder,
        generative_pooler=AttentionPooler(dim, num_queries, num_heads),
        contrastive_pooler=AttentionPooler(dim, 1, num_heads),
        text_decoder=unimodal,
        multimodal_decoder=multimodal,
        logit_scale=LogitScale(temperature=temperature, bias=logit_bias, learned=learned_temperature),
        pooler_norm=pooler_norm,
    )


def _check_heads(who: str, dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"{who}: dim must be a multiple of num_heads, got {dim=}, {num_heads=}")


def _check_names(who: str, **choices: tuple[str, dict[str, Any]]) -> None:
    for argument, (name, known) in choices.items():
        if name not in known:
            raise ValueError(f"{who}: {argument} must be one of {', '.join(known)}, got {name!r}")
