"""Attention maps: how much each patch of an image contributes while a caption is written."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grr.components import AttentionPooler, ClassToken, CrossAttention
from grr.models.coca import CoCa, VisionTransformer, evaluating


@torch.no_grad()
def word_attention(model: CoCa, images: Tensor, ids: Tensor, *, positions: Tensor) -> Tensor | None:
    """Returns the attention of every token over the patches: float32 [b, s, rows, columns]; each map sums to 1.

    images: uint8 or normalised float [b, 3, h, w]; ids, positions: [b, s] of `collate_captions`. Row i is what the
    decoder reads to write token i + 1. The decoder attends to the queries of the generative pooler and these attend to
    the patches: a map is the product of both, each averaged over its heads and the first over all layers (attention
    rollout, Abnar and Zuidema 2020, through one pooler). The forward pass runs without compiled code; its weights are
    computed again, with a softmax in float32. Returns None if the vision encoder is not a `VisionTransformer` or a
    part of the model attends in a way of its own.
    """
    poolers = [m for m in model.generative_pooler.modules() if isinstance(m, AttentionPooler | CrossAttention)]
    layers = [m for m in model.multimodal_decoder.modules() if isinstance(m, CrossAttention)]
    if not isinstance(model.vision_encoder, VisionTransformer) or len(poolers) != 1 or not layers:
        return None
    weights: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        weights[module] = attention_weights(module, *inputs)

    hooks = [module.register_forward_pre_hook(record) for module in (*poolers, *layers)]
    try:
        with evaluating(model), _without_compiled_code(model):
            context = model.image_context(images)
            model.from_context(context, ids, positions=positions)
    finally:
        for hook in hooks:
            hook.remove()
    over_queries = torch.stack([weights[layer] for layer in layers]).mean(0)  # [b, s, n]
    over_patches = weights[poolers[0]][:, -over_queries.shape[2] :]  # [b, n, p]; open_clip's first query is not read
    if isinstance(model.vision_encoder.class_token, ClassToken):
        over_patches = over_patches[:, :, 1:]
    maps = over_queries @ over_patches  # [b, s, p]
    patch_size = model.vision_encoder.patches.patch_size
    rows, columns = (side // patch_size for side in images.shape[2:])
    return (maps / maps.sum(-1, keepdim=True)).view(*maps.shape[:2], rows, columns)


def attention_weights(module: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Returns the softmax of an `AttentionPooler`, or of a `CrossAttention`, at its inputs: float32 [b, s, t], the mean
    over its heads. Each row sums to 1."""
    if isinstance(module, AttentionPooler):
        queries = module.queries.expand(len(x), -1, -1)
        keys = module.kv(x).chunk(2, dim=-1)[0]
        q, k = (_heads(y, module.num_heads) for y in (queries, keys))
    else:
        assert isinstance(module, CrossAttention)
        assert context is not None
        keys = module.kv(module.context_norm(context)).chunk(2, dim=-1)[0]
        q = module.q_norm(_heads(module.q(x), module.num_heads))
        k = module.k_norm(_heads(keys, module.num_heads))
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5  # [b, h, s, t]
    return F.softmax(scores, dim=-1).mean(1)


def _without_compiled_code(model: nn.Module) -> AbstractContextManager[object]:
    """Run a compiled model eagerly: compiled code does not call the hooks that are registered later."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()  # torch.compiler imports torch._dynamo, which takes seconds


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[b, s, d] -> [b, h, s, k]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
