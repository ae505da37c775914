"""The vocabulary head over chunks of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # labelled tokens whose logits exist at a time: 2,048 x 32,102 float32 are 263 MB


def token_losses(hidden: Tensor, targets: Tensor, head: nn.Linear, *, chunk: int = CHUNK) -> Tensor:
    """Compute the cross-entropy of each token, without ever holding the logits of more than `chunk` tokens.

    hidden: [n, d], targets: [n] -> float32 [n]. The logits are computed again for the gradient, with the weights that
    the head holds at this call, because the head may hold others in the backward pass: `grr.parallel.bf16` puts
    bfloat16 copies there for the forward pass alone.
    """
    weights: dict[str, Tensor] = dict(head.named_parameters())

    def of_chunk(hidden: Tensor, targets: Tensor, weights: dict[str, Tensor]) -> Tensor:
        logits = functional_call(head, weights, (hidden,))
        return F.cross_entropy(at_least_float32(logits), targets, reduction="none")

    if len(hidden) <= chunk:
        return of_chunk(hidden, targets, weights)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(of_chunk, h, t, weights, use_reentrant=False) for h, t in pieces])


def at_least_float32(x: Tensor) -> Tensor:
    """Cast numbers of fewer bits to float32, and keep float64, in which tests check gradients."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
