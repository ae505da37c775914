"""Names and layouts of weights in open_clip's contrastive captioners, by the names of this library."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from grr.components import SelfAttention
from grr.models.coca import CoCa

Change = Callable[[Tensor], Tensor]
Sources = dict[str, list[tuple[str, Change]]]  # own name -> names of open_clip; what is made of them is concatenated


def sources_of(model: CoCa, names: Iterable[str]) -> Sources:
    """Returns what parameters of a model of `open_clip_coca` are made of, concatenated along the first axis."""
    state, modern = model.state_dict(), model.text_vector == "eos"
    outside = OUTSIDE_OF_BLOCKS | (MODERN if modern else {})
    for own, theirs in POOLERS.items():
        if (keys := state.get(f"{own}.attention.kv.weight")) is not None:
            outside |= _pooler(own, theirs, one_matrix=keys.shape[0] == 2 * keys.shape[1])
    num_heads = next((x.num_heads for x in model.text_decoder.modules() if isinstance(x, SelfAttention)), 1)

    def sources(name: str) -> list[tuple[str, Change]]:
        if name in outside:
            return outside[name]
        if modern and not name.startswith("vision_encoder."):
            return [_in_a_modern_block(name, num_heads)]
        return [_in_a_block(name)]

    return {name: sources(name) for name in names}


# --- how a tensor of open_clip changes ------------------------------------------------------------------------------


def _same(x: Tensor) -> Tensor:
    return x


def _row(x: Tensor) -> Tensor:
    return x.unsqueeze(0)


def _transposed(x: Tensor) -> Tensor:
    return x.mT


def _queries(x: Tensor) -> Tensor:
    """Returns the query rows of concatenated query, key and value projections."""
    return x.chunk(3)[0]


def _keys_and_values(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(3)[1:])


def _rotary_halves(x: Tensor, num_heads: int) -> Tensor:
    """Reorder the query and key rows of each head: pairs of channels 2 i and 2 i + 1 become i and i + k/2 (PAIRING)."""
    q, k, v = x.chunk(3)
    q, k = (rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2) for rows in (q, k))
    return torch.cat((q, k, v))


def _gate_first(x: Tensor) -> Tensor:
    """Exchange the halves of the rows: open_clip has those of the gate behind those of the linear branch."""
    return torch.cat(x.chunk(2)[::-1])


def _zero(x: Tensor) -> Tensor:
    return torch.zeros(1)


def _zero_row(x: Tensor) -> Tensor:
    return torch.zeros(1, x.shape[1])


# --- names of this library, and those of open_clip ------------------------------------------------------------------

OUTSIDE_OF_BLOCKS: Sources = {
    "vision_encoder.class_token.weight": [("visual.class_embedding", _same)],
    "vision_encoder.positions.weight": [("visual.positional_embedding", _same)],
    "vision_encoder.norm.weight": [("visual.ln_pre.weight", _same)],
    "vision_encoder.norm.bias": [("visual.ln_pre.bias", _same)],
    "pooler_norm.weight": [("visual.ln_post.weight", _same)],
    "pooler_norm.bias": [("visual.ln_post.bias", _same)],
    "generative_pooler.1.weight": [("visual.ln_post.weight", _same)],
    "generative_pooler.1.bias": [("visual.ln_post.bias", _same)],
    "contrastive_pooler.projection.weight": [("visual.proj", _transposed)],
    "text_decoder.embedding.weight": [("text.token_embedding.weight", _same), ("text.cls_emb", _row)],
    "text_decoder.positions.weight": [("text.positional_embedding", _same)],
    "text_projection.0.weight": [("text.ln_final.weight", _same)],
    "text_projection.0.bias": [("text.ln_final.bias", _same)],
    "text_projection.1.weight": [("text.text_projection", _transposed)],
    "multimodal_decoder.norm.weight": [("text_decoder.ln_final.weight", _same)],
    "multimodal_decoder.norm.bias": [("text_decoder.ln_final.bias", _same)],
    "multimodal_decoder.head.weight": [("text_decoder.text_projection", _transposed)],
    "logit_scale.log_scale": [("logit_scale", torch.atleast_1d)],
    "logit_scale.bias": [("logit_scale", _zero)],
}
MODERN: Sources = {  # instead of those above, for text_arch="modern"
    "text_decoder.embedding.weight": [
        ("text.token_embedding.weight", _same),
        ("text.token_embedding.weight", _zero_row),  # of CLS, which nothing reads
    ],
    "text_decoder.norm.weight": [("text.ln_final.weight", _same)],
    "text_projection.weight": [("text.text_projection.weight", _same)],
    "multimodal_decoder.head.weight": [("text_decoder.lm_head.weight", _same)],
}
POOLERS = {
    "generative_pooler.0": "visual.attn_pool",  # followed by a norm, where it is the only one
    "generative_pooler": "visual.attn_pool",
    "contrastive_pooler": "visual.attn_pool_contrastive",
}
BLOCK: dict[str, tuple[str, Change]] = {  # prefixes of `weight` and `bias`
    "attention_norm.": ("ln_1.", _same),
    "attention.qkv.": ("attn.in_proj_", _same),
    "attention.out.": ("attn.out_proj.", _same),
    "cross_attention_norm.": ("ln_1.", _same),
    "cross_attention.context_norm.": ("ln_1_kv.", _same),
    "cross_attention.q.": ("attn.in_proj_", _queries),
    "cross_attention.kv.": ("attn.in_proj_", _keys_and_values),
    "cross_attention.out.": ("attn.out_proj.", _same),
    "feed_forward_norm.": ("ln_2.", _same),
    "feed_forward.up.": ("mlp.c_fc.", _same),
    "feed_forward.down.": ("mlp.c_proj.", _same),
}
MODERN_BLOCK: dict[str, tuple[str, Change]] = {  # but attention.qkv, which depends on the number of heads
    "attention_norm.": ("norm1.", _same),
    "attention.gate.": ("attn.gate.", _same),
    "attention.out.": ("attn.proj.", _same),
    "cross_attention_norm.": ("norm_x.", _same),
    "cross_attention.q.": ("xattn.q.", _same),
    "cross_attention.kv.": ("xattn.kv.", _same),
    "cross_attention.gate.": ("xattn.gate.", _same),
    "cross_attention.out.": ("xattn.proj.", _same),
    "feed_forward_norm.": ("norm2.", _same),
    "feed_forward.up.": ("mlp.w12.", _gate_first),
    "feed_forward.down.": ("mlp.w3.", _same),
}
TOWERS = {"vision_encoder": "visual", "text_decoder": "text", "multimodal_decoder": "text_decoder"}


def _pooler(own: str, theirs: str, *, one_matrix: bool) -> Sources:
    """Returns the sources of a `CrossAttentionPooler`; one_matrix: as torch stores projections of one width."""
    q: tuple[str, Change] = (f"{theirs}.attn.q_proj_weight", _same)
    kv: list[tuple[str, Change]] = [(f"{theirs}.attn.{x}_proj_weight", _same) for x in "kv"]
    if one_matrix:
        joined = f"{theirs}.attn.in_proj_weight"
        q, kv = (joined, _queries), [(joined, _keys_and_values)]
    biases = f"{theirs}.attn.in_proj_bias"
    return {
        f"{own}.queries": [(f"{theirs}.query", _same)],
        **{f"{own}.norm.{x}": [(f"{theirs}.ln_q.{x}", _same)] for x in ("weight", "bias")},
        **{f"{own}.attention.context_norm.{x}": [(f"{theirs}.ln_k.{x}", _same)] for x in ("weight", "bias")},
        f"{own}.attention.q.weight": [q],
        f"{own}.attention.q.bias": [(biases, _queries)],
        f"{own}.attention.kv.weight": kv,
        f"{own}.attention.kv.bias": [(biases, _keys_and_values)],
        **{f"{own}.attention.out.{x}": [(f"{theirs}.attn.out_proj.{x}", _same)] for x in ("weight", "bias")},
    }


def _in_a_block(name: str) -> tuple[str, Change]:
    tower, _, number, rest = name.split(".", 3)  # vision_encoder.blocks.3.attention.qkv.weight
    cut = rest.rindex(".") + 1
    theirs, change = BLOCK[rest[:cut]]
    block = f"{TOWERS[tower]}.transformer.resblocks.{number}"
    if tower == "multimodal_decoder":  # self-attention and cross-attention blocks alternate
        block = f"text_decoder.{('resblocks', 'cross_attn')[int(number) % 2]}.{int(number) // 2}"
    return f"{block}.{theirs}{rest[cut:]}", change


def _in_a_modern_block(name: str, num_heads: int) -> tuple[str, Change]:
    tower, _, number, rest = name.split(".", 3)
    cut = rest.rindex(".") + 1
    halves: tuple[str, Change] = ("attn.qkv.", partial(_rotary_halves, num_heads=num_heads))
    theirs, change = halves if rest[:cut] == "attention.qkv." else MODERN_BLOCK[rest[:cut]]
    return f"{TOWERS[tower]}.blocks.{number}.{theirs}{rest[cut:]}", change
