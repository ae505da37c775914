"""Write captions: one token after the other, each computed once."""

import torch
from torch import Tensor

from grr.model import CoCa
from grr.tokenizer import Tokenizer


@torch.no_grad()
def generate(model: CoCa, images: Tensor, tokenizer: Tokenizer, *, max_tokens: int | None = None) -> list[str]:
    """Write the most likely next token (greedy search) until each caption has ended.

    images: uint8 or normalised float [b, 3, h, w] -> b captions of at most max_tokens tokens (None: as many as the
    tokenizer's context has room for, which is context - 3). The image is read once, and every token as well: keys and
    values are kept. PAD, BOS and CLS are never written.
    """
    room = tokenizer.context - 3  # BOS, EOS and CLS stand in every row
    max_tokens = room if max_tokens is None else min(max_tokens, room)
    was_training = model.training
    model.eval()
    context = model.image_context(images)  # [b, n, d]
    caches = model.caches(context.shape[1], max_tokens + 1)
    ids = torch.full((len(images), 1), tokenizer.bos_id, device=images.device)
    ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    written: list[Tensor] = []
    for position in range(max_tokens):
        positions = torch.tensor([position], device=images.device)
        logits = model.next_token_logits(ids, context, positions=positions, caches=caches)  # [b, v]
        logits[:, [tokenizer.pad_id, tokenizer.bos_id, tokenizer.cls_id]] = -torch.inf
        ids = logits.argmax(dim=-1, keepdim=True)  # [b, 1]
        written.append(ids)
        ended |= ids[:, 0] == tokenizer.eos_id
        if ended.all():
            break
    model.train(was_training)
    return [tokenizer.decode(row.tolist()) for row in torch.cat(written, dim=1)]
