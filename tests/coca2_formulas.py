"""open_clip's coca2 models without open_clip: the shapes of their weights by name, and their formulas in float64.

A description is one of open_clip's model_configs. The poolers are those of CoCa (Yu et al. 2022, section 3.2), the
modern text decoders those of Llama (RMSNorm, rotary pairs 2 i and 2 i + 1, SwiGLU) with gated attention.
"""

import copy
import math

import torch
from torch import Tensor

PUBLISHED = {
    "coca2_ViT-B-32": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32, "attentional_pool": "cascade",
                       "attn_pooler_heads": 8, "output_tokens": True},
        "text_cfg": {"context_length": 76, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12,
                     "embed_cls": True, "correct_cls_mask": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12,
                           "attn_pooler_heads": 8},
        "custom_text": True,
    },
    "coca2-moderntext_ViT-B-32": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32, "attentional_pool": "cascade",
                       "attn_pooler_heads": 8, "output_tokens": True},
        "text_cfg": {"text_arch": "modern", "context_length": 76, "vocab_size": 49408, "width": 512, "heads": 8,
                     "layers": 12, "pool_type": "eos", "bos_id": 49406, "eos_id": 49407, "attention_mode": "causal",
                     "pos_embed": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm", "norm_eps": 1e-06,
                     "attn_gated": True, "freeze_pad_embed": False, "output_tokens": True},
        "multimodal_cfg": {"text_arch": "modern", "context_length": 76, "vocab_size": 49408, "width": 512, "heads": 8,
                           "layers": 12, "pos_embed": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm",
                           "norm_eps": 1e-06, "attn_gated": True},
        "custom_text": True,
    },
}  # fmt: skip


def small(name: str, *, vocab_size: int = 50, context_length: int = 10, vision_width: int = 48) -> dict:
    """Returns a published description with small sizes; images have 24 x 24 pixels."""
    description = copy.deepcopy(PUBLISHED[name])
    description["embed_dim"] = 32
    vision = {"image_size": 24, "layers": 2, "width": vision_width, "head_width": 16, "patch_size": 8}
    description["vision_cfg"] |= vision | {"attn_pooler_heads": 4, "attn_pooler_queries": 6}
    text = {"context_length": context_length, "vocab_size": vocab_size, "width": 32, "heads": 2, "layers": 2}
    description["text_cfg"] |= text
    description["multimodal_cfg"] |= text | {"layers": 3}
    if is_modern(description):
        description["text_cfg"] |= {"bos_id": vocab_size - 2, "eos_id": vocab_size - 1}
    return description


def is_modern(description: dict) -> bool:
    return description["text_cfg"].get("text_arch") == "modern"


# --- weights --------------------------------------------------------------------------------------------------------


def shapes(description: dict) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of open_clip's weights, by its names."""
    vision, text, multimodal = (description[key] for key in ("vision_cfg", "text_cfg", "multimodal_cfg"))
    d, c, v, patch = description["embed_dim"], vision["width"], text["vocab_size"], vision["patch_size"]
    found: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (c, 3, patch, patch),
        "visual.class_embedding": (c,),
        "visual.positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, c),
        "text.token_embedding.weight": (v, d),
        "logit_scale": (),
        **_norm("visual.ln_pre", c),
        **_blocks("visual.transformer.resblocks", c, vision["layers"]),
        **_pooler("visual.attn_pool", d, c, vision.get("attn_pooler_queries", 256)),
    }
    if vision["attentional_pool"] == "cascade":
        found |= _norm("visual.ln_post", c) | _pooler("visual.attn_pool_contrastive", d, d, 1)
    else:
        found |= _norm("visual.ln_post", d) | {"visual.proj": (d, d)}
    if is_modern(description):
        found |= _modern_blocks("text.blocks", d, text["layers"], cross=False) | {"text.ln_final.weight": (d,)}
        found |= {"text.text_projection.weight": (d, d)}
        found |= _modern_blocks("text_decoder.blocks", d, multimodal["layers"], cross=True)
        return found | {"text_decoder.ln_final.weight": (d,), "text_decoder.lm_head.weight": (v, d)}
    found |= {"text.cls_emb": (d,), "text.positional_embedding": (text["context_length"] + 1, d)}
    found |= _blocks("text.transformer.resblocks", d, text["layers"]) | _norm("text.ln_final", d)
    found |= {"text.text_projection": (d, d), "text_decoder.text_projection": (d, v)}
    found |= _blocks("text_decoder.resblocks", d, multimodal["layers"]) | _norm("text_decoder.ln_final", d)
    found |= _blocks("text_decoder.cross_attn", d, multimodal["layers"])
    for i in range(multimodal["layers"]):
        found |= _norm(f"text_decoder.cross_attn.{i}.ln_1_kv", d)
    return found


def random_weights(description: dict, seed: int = 0) -> dict[str, Tensor]:
    """Returns weights of unit outputs, and biases and norms that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(description).items():
        transposed = name.endswith(("text_projection", "visual.proj"))
        scale = shape[0 if transposed else -1] ** -0.5 if len(shape) > 1 else 0.3
        mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        weights[name] = torch.randn(shape, generator=generator) * scale + mean
    return weights


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _attention(name: str, width: int, context: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{name}.in_proj_bias": (3 * width,)}
    if context == width:  # torch keeps one matrix
        found |= {f"{name}.in_proj_weight": (3 * width, width)}
    else:
        found |= {f"{name}.{x}_proj_weight": (width, width if x == "q" else context) for x in "qkv"}
    return found | _linear(f"{name}.out_proj", width, width)


def _pooler(name: str, width: int, context: int, queries: int) -> dict[str, tuple[int, ...]]:
    norms = _norm(f"{name}.ln_q", width) | _norm(f"{name}.ln_k", context)
    return {f"{name}.query": (queries, width)} | norms | _attention(f"{name}.attn", width, context)


def _blocks(name: str, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        found |= _norm(f"{name}.{i}.ln_1", width) | _norm(f"{name}.{i}.ln_2", width)
        found |= _attention(f"{name}.{i}.attn", width, width)
        found |= _linear(f"{name}.{i}.mlp.c_fc", 4 * width, width) | _linear(f"{name}.{i}.mlp.c_proj", width, 4 * width)
    return found


def _modern_blocks(name: str, d: int, layers: int, *, cross: bool) -> dict[str, tuple[int, ...]]:
    matrices = {"attn.qkv": (3 * d, d), "attn.gate": (d, d), "attn.proj": (d, d)}
    matrices |= {"mlp.w12": (8 * d, d), "mlp.w3": (d, 4 * d), "norm1": (d,), "norm2": (d,)}
    if cross:
        matrices |= {"xattn.q": (d, d), "xattn.kv": (2 * d, d), "xattn.gate": (d, d), "xattn.proj": (d, d)}
        matrices |= {"norm_x": (d,)}
    return {f"{name}.{i}.{part}.weight": shape for i in range(layers) for part, shape in matrices.items()}


# --- formulas -------------------------------------------------------------------------------------------------------


class Formulas:
    """The functions of a model in open_clip's layout of ids: BOS t1 ... tn EOS PAD ... PAD, PAD is 0."""

    def __init__(self, description: dict, weights: dict[str, Tensor]) -> None:
        self.w = {name: weight.double() for name, weight in weights.items()}
        self.vision, self.text, self.multimodal = (
            description[key] for key in ("vision_cfg", "text_cfg", "multimodal_cfg")
        )
        self.modern = is_modern(description)

    def __call__(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns image embeddings [b, e], text embeddings [b, e] and logits [b, s, v] of the next tokens."""
        image, context = self.images(pixels)
        embedding, tokens = self.texts(ids)
        return _unit(image), _unit(embedding), self.logits(context, tokens)

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images: pixels normalised by CLIP's constants -> [b, e], and the vectors that captions attend to."""
        w, c = self.w, self.vision
        patches = torch.nn.functional.unfold(pixels.double(), c["patch_size"], stride=c["patch_size"]).mT
        x = patches @ w["visual.conv1.weight"].flatten(1).T
        x = torch.cat((w["visual.class_embedding"].expand(len(x), 1, -1), x), 1) + w["visual.positional_embedding"]
        x = self._layer_norm("visual.ln_pre", x)
        for i in range(c["layers"]):
            x = self._block(f"visual.transformer.resblocks.{i}", x, c["width"] // c.get("head_width", 64))
        if c["attentional_pool"] == "cascade":
            generative = self._pool("visual.attn_pool", self._layer_norm("visual.ln_post", x))
            return self._pool("visual.attn_pool_contrastive", generative)[:, 0], generative
        x = self._layer_norm("visual.ln_post", self._pool("visual.attn_pool", x))
        return x[:, 0] @ w["visual.proj"], x[:, 1:]

    def texts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embed texts: ids [b, s] -> [b, e], and the token vectors that the decoder reads."""
        w, (b, s), heads = self.w, ids.shape, self.text["heads"]
        x = w["text.token_embedding.weight"][ids]
        if self.modern:
            for i in range(self.text["layers"]):
                x = self._modern_block(f"text.blocks.{i}", x, heads)
            x = _rms_norm(x, w["text.ln_final.weight"])
            end = (ids == self.text["eos_id"]).int().argmax(1)
            return x[torch.arange(b), end] @ w["text.text_projection.weight"].T, x
        x = torch.cat((x, w["text.cls_emb"].expand(b, 1, -1)), 1) + w["text.positional_embedding"][: s + 1]
        seen = torch.cat((ids != 0, torch.ones(b, 1, dtype=torch.bool)), 1).unsqueeze(1)  # [b, 1, s + 1]
        seen = seen & torch.ones(s + 1, s + 1, dtype=torch.bool).tril()
        for i in range(self.text["layers"]):
            x = self._block(f"text.transformer.resblocks.{i}", x, heads, seen=seen)
        return self._layer_norm("text.ln_final", x[:, -1]) @ w["text.text_projection"], x[:, :-1]

    def logits(self, context: Tensor, x: Tensor) -> Tensor:
        w, heads = self.w, self.multimodal["heads"]
        for i in range(self.multimodal["layers"]):
            if self.modern:
                x = self._modern_block(f"text_decoder.blocks.{i}", x, heads, context=context)
                continue
            earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            x = self._block(f"text_decoder.resblocks.{i}", x, heads, seen=earlier)
            x = self._block(f"text_decoder.cross_attn.{i}", x, heads, context=context)
        if self.modern:
            return _rms_norm(x, w["text_decoder.ln_final.weight"]) @ w["text_decoder.lm_head.weight"].T
        return self._layer_norm("text_decoder.ln_final", x) @ w["text_decoder.text_projection"]

    def _layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def _attention(self, name: str, x: Tensor, context: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
        w, joined = self.w, f"{name}.in_proj_weight"
        matrices = w[joined].chunk(3) if joined in w else [w[f"{name}.{part}_proj_weight"] for part in "qkv"]
        q, k, v = (
            y @ matrix.T + bias
            for y, matrix, bias in zip((x, context, context), matrices, w[f"{name}.in_proj_bias"].chunk(3), strict=True)
        )
        return _attend(q, k, v, heads, seen) @ w[f"{name}.out_proj.weight"].T + w[f"{name}.out_proj.bias"]

    def _pool(self, name: str, x: Tensor) -> Tensor:
        queries = self._layer_norm(f"{name}.ln_q", self.w[f"{name}.query"]).expand(len(x), -1, -1)
        return self._attention(
            f"{name}.attn", queries, self._layer_norm(f"{name}.ln_k", x), self.vision["attn_pooler_heads"]
        )

    def _block(
        self, name: str, x: Tensor, heads: int, *, seen: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        w, y = self.w, self._layer_norm(f"{name}.ln_1", x)
        x = x + self._attention(
            f"{name}.attn", y, y if context is None else self._layer_norm(f"{name}.ln_1_kv", context), heads, seen
        )
        hidden = self._layer_norm(f"{name}.ln_2", x) @ w[f"{name}.mlp.c_fc.weight"].T + w[f"{name}.mlp.c_fc.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return x + hidden @ w[f"{name}.mlp.c_proj.weight"].T + w[f"{name}.mlp.c_proj.bias"]

    def _modern_block(self, name: str, x: Tensor, heads: int, context: Tensor | None = None) -> Tensor:
        def of(part: str) -> Tensor:
            return self.w[f"{name}.{part}.weight"]

        y = _rms_norm(x, of("norm1"))
        q, k, v = (y @ of("attn.qkv").T).chunk(3, dim=-1)
        earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        y = _attend(_rotate(q, heads), _rotate(k, heads), v, heads, earlier) * torch.sigmoid(y @ of("attn.gate").T)
        x = x + y @ of("attn.proj").T
        if context is not None:
            y = _rms_norm(x, of("norm_x"))
            k, v = (context @ of("xattn.kv").T).chunk(2, dim=-1)
            read = _attend(y @ of("xattn.q").T, k, v, heads)
            x = x + (read * torch.sigmoid(y @ of("xattn.gate").T)) @ of("xattn.proj").T
        value, gate = (_rms_norm(x, of("norm2")) @ of("mlp.w12").T).chunk(2, dim=-1)
        return x + (value * gate * torch.sigmoid(gate)) @ of("mlp.w3").T


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """Multi-head attention without projections; seen: where a query [s] may attend to a key [t]."""
    outputs = []
    for a, b, c in zip(*(x.chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
        scores = a @ b.mT / math.sqrt(a.shape[-1])
        scores = scores if seen is None else scores.masked_fill(~seen, -math.inf)
        outputs.append(scores.softmax(-1) @ c)
    return torch.cat(outputs, dim=-1)


def _rotate(x: Tensor, heads: int) -> Tensor:
    """Rotate channels 2 i and 2 i + 1 of each head by position * 10,000^(-2 i / k), as complex numbers."""
    b, s, d = x.shape
    k = d // heads
    angles = torch.arange(s).double().outer(10_000.0 ** -(torch.arange(0, k, 2).double() / k))  # [s, k/2]
    pairs = torch.view_as_complex(x.reshape(b, s, heads, k // 2, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)).reshape(b, s, d)
