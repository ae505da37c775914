"""Contrastive captioners of open_clip (Ilharco et al. 2021), built from the primitives of this library.

They differ from the CoCa of the paper. The ViT has a class token. There is one pooler, whose queries are normalised and
projected; the first of its 256 vectors is the image embedding, and captions attend to the others. The vector at CLS is
normalised and projected. In the multimodal decoder, blocks of self-attention and of cross-attention alternate, each
with an MLP. Two later architectures, for which there are no released weights, have the paper's cascade of poolers, and
one of them text decoders of another kind. `grr.inference.convert` converts checkpoints of open_clip to these models.
"""

from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from grr.components import (
    ClassToken,
    CrossAttention,
    CrossAttentionPooler,
    LayerNorm,
    LearnedPositions,
    PatchEmbedding,
    RMSNorm,
)
from grr.models.coca import CoCa, LogitScale, MultimodalDecoder, TextDecoder, VisionTransformer
from grr.models.open_clip_parts import (
    FirstVector,
    HeadWithoutLast,
    PaddedTextDecoder,
    alternating_blocks,
    modern_blocks,
    plain_block,
)
from grr.models.sizes import check_sizes

TextArch = Literal["clip", "modern"]


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
    cascade_pooler: bool = False,
    text_arch: TextArch = "clip",
    dropout: float = 0.0,
    temperature: float = 0.07,
) -> CoCa:
    """Build open_clip's CoCa; the defaults are its ViT-B/32.

    `dim` is the width of text, pooled vectors and embeddings. `vocab_size` and `context_length` include CLS, which
    open_clip stores separately: 49,408 + 1 ids and 76 + 1 tokens; the head has no weights for it. With
    `correct_cls_mask`, CLS attends to the caption and not to padding. That is correct and faster on short captions, but
    the released weights were trained otherwise (see `PaddedTextDecoder`). With `cascade_pooler`, the poolers read
    normalised patches, and the image embedding is the output of a pooler of one query that attends to the 256 vectors
    of the generative pooler, all of which captions attend to (Yu et al. 2022, section 3.2).

    Text decoders of `text_arch` "modern" are built of `modern_blocks`, and the multimodal decoder reads normalised
    text. The text embedding is the vector at EOS; CLS and `correct_cls_mask` have no effect. As in all text decoders
    here, later tokens do not attend to the id of PAD within a caption; open_clip's modern ones do.

    Images are normalised with the constants of this library; the converter adds the difference from CLIP's constants to
    the patch embedding, which does not have a bias in open_clip. Source: open_clip 3.3, and later commits of its main
    branch for `cascade_pooler` and `text_arch`.
    Raises ValueError if image_size is not a multiple of patch_size, a width of its heads, a size is not a positive int,
    or text_arch is not known.
    """
    check_sizes("open_clip_coca", locals())
    if image_size % patch_size:
        raise ValueError(
            f"open_clip_coca: image_size must be a multiple of patch_size, got {image_size=}, {patch_size=}"
        )
    if text_arch not in get_args(TextArch):
        raise ValueError(f"open_clip_coca: text_arch must be one of {', '.join(get_args(TextArch))}, got {text_arch!r}")
    generative_pooler, contrastive_pooler = _poolers(
        dim=dim, vision_dim=vision_dim, num_heads=pooler_heads, num_queries=num_queries, cascade=cascade_pooler
    )
    modern = text_arch == "modern"
    text_decoder, text_projection = _text_decoder(
        vocab_size=vocab_size,
        context_length=context_length,
        dim=dim,
        num_heads=num_heads,
        num_layers=text_layers,
        modern=modern,
        correct_cls_mask=correct_cls_mask,
        dropout=dropout,
    )
    image: Literal["all", "rest"] = "all" if cascade_pooler else "rest"
    return CoCa(
        vision_encoder=VisionTransformer(
            patches=PatchEmbedding(vision_dim, patch_size),
            class_token=ClassToken(vision_dim),
            positions=LearnedPositions(vision_dim, (image_size // patch_size) ** 2 + 1),
            norm=LayerNorm(vision_dim),
            blocks=(plain_block(vision_dim, vision_heads, causal=False, dropout=dropout) for _ in range(vision_layers)),
            dropout=dropout,
        ),
        pooler_norm=LayerNorm(vision_dim) if cascade_pooler else None,
        generative_pooler=generative_pooler,
        contrastive_pooler=contrastive_pooler,
        text_decoder=text_decoder,
        text_projection=text_projection,
        text_vector="eos" if modern else "cls",
        multimodal_decoder=MultimodalDecoder(
            blocks=modern_blocks(dim, num_heads, multimodal_layers, image=image, dropout=dropout)
            if modern
            else alternating_blocks(dim, num_heads, multimodal_layers, image=image, dropout=dropout),
            norm=RMSNorm(dim) if modern else LayerNorm(dim),
            head=HeadWithoutLast(dim, vocab_size),
        ),
        logit_scale=LogitScale(temperature=temperature, learned=True),
    )


def _poolers(
    *, dim: int, vision_dim: int, num_heads: int, num_queries: int, cascade: bool
) -> tuple[nn.Module, nn.Module]:
    """Returns the generative and the contrastive pooler."""
    attention = CrossAttention(dim, num_heads, context_dim=vision_dim, context_norm=LayerNorm(vision_dim))
    generative = CrossAttentionPooler(dim, num_queries, norm=LayerNorm(dim), attention=attention)
    if not cascade:
        return nn.Sequential(generative, LayerNorm(dim)), FirstVector(dim)
    attention = CrossAttention(dim, num_heads, context_norm=LayerNorm(dim))
    return generative, CrossAttentionPooler(dim, 1, norm=LayerNorm(dim), attention=attention)


def _text_decoder(
    *,
    vocab_size: int,
    context_length: int,
    dim: int,
    num_heads: int,
    num_layers: int,
    modern: bool,
    correct_cls_mask: bool,
    dropout: float,
) -> tuple[TextDecoder, nn.Module]:
    """Returns a unimodal text decoder and the projection of its vectors to text embeddings."""
    embedding = nn.Embedding(vocab_size, dim)
    if modern:
        decoder = TextDecoder(
            embedding=embedding,
            blocks=modern_blocks(dim, num_heads, num_layers, image="none", dropout=dropout),
            norm=RMSNorm(dim),
            dropout=dropout,
        )
        return decoder, nn.Linear(dim, dim, bias=False)
    kind = TextDecoder if correct_cls_mask else PaddedTextDecoder
    decoder = kind(
        embedding=embedding,
        positions=LearnedPositions(dim, context_length),
        blocks=(plain_block(dim, num_heads, causal=True, dropout=dropout) for _ in range(num_layers)),
        dropout=dropout,
    )
    return decoder, nn.Sequential(LayerNorm(dim), nn.Linear(dim, dim, bias=False))


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
    cascade_pooler: bool = False,
    text_arch: TextArch = "clip",
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
    cascade_pooler: bool = False,
    text_arch: TextArch = "clip",
    dropout: float = 0.0,
    temperature: float = 0.07,
) -> CoCa:
    """Build open_clip's coca_ViT-L-14: 638.5 M parameters.

    Released as laion2b_s13b_b90k, and fine-tuned on COCO as mscoco_finetuned_laion2b_s13b_b90k.
    Raises ValueError as `open_clip_coca` does.
    """
    return open_clip_coca(**locals())


def open_clip_coca2_vit_b_32(
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
    correct_cls_mask: bool = True,
    cascade_pooler: bool = True,
    text_arch: TextArch = "clip",
    dropout: float = 0.0,
    temperature: float = 0.07,
) -> CoCa:
    """Build open_clip's coca2_ViT-B-32: 254.4 M parameters, with a cascade of poolers and the correct mask of CLS.

    Raises ValueError as `open_clip_coca` does.
    """
    return open_clip_coca(**locals())


def open_clip_coca2_moderntext_vit_b_32(
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
    cascade_pooler: bool = True,
    text_arch: TextArch = "modern",
    dropout: float = 0.0,
    temperature: float = 0.07,
) -> CoCa:
    """Build open_clip's coca2-moderntext_ViT-B-32: 263.5 M parameters, with a cascade of poolers and modern decoders.

    Raises ValueError as `open_clip_coca` does.
    """
    return open_clip_coca(**locals())


OPEN_CLIP_MODELS: dict[str, Callable[..., CoCa]] = {
    "open_clip_coca": open_clip_coca,
    "open_clip_coca_vit_b_32": open_clip_coca_vit_b_32,
    "open_clip_coca_vit_l_14": open_clip_coca_vit_l_14,
    "open_clip_coca2_vit_b_32": open_clip_coca2_vit_b_32,
    "open_clip_coca2_moderntext_vit_b_32": open_clip_coca2_moderntext_vit_b_32,
}
