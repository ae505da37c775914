"""The vocabulary head over chunks of tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 4096  # labelled tokens whose logits exist at a time: 4,096 x 32,102 float32 are 526 MB


def cross_entropies(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the cross-entropy of each token: hidden [n, d], targets [n], weight [v, d], bias [v] -> float32 [n]."""
    return F.cross_entropy(at_least_float32(F.linear(hidden, weight, bias)), targets, reduction="none")


def token_losses(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Linear,
    *,
    chunk: int = CHUNK,
    losses: Callable[..., Tensor] = cross_entropies,
) -> Tensor:
    """Compute the cross-entropy of each token, without ever holding the logits of more than `chunk` tokens.

    hidden: [n, d], targets: [n] -> float32 [n]. The logits of more tokens are computed again for the gradient, with the
    weights that the head holds at this call, because the head may hold others in the backward pass: `grr.parallel.bf16`
    puts bfloat16 copies there for the forward pass alone. losses: `cross_entropies`, or that compiled.
    """
    weight, bias = _padded(head)
    if len(hidden) <= chunk:
        return losses(hidden, targets, weight, bias)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(losses, h, t, weight, bias, use_reentrant=False) for h, t in pieces])


def aligned(width: int) -> int:
    """Returns the width to which a matrix of 16-bit numbers is padded: `width` itself if it is a multiple of 8.

    A GPU multiplies such matrices at its full rate if their rows are multiples of 16 bytes. Others are padded to
    multiples of 8, or from 1,024 on of 64, which fill its tiles as well.
    """
    step = 64 if width >= 1024 else 8
    return width if width % 8 == 0 else -(-width // step) * step


def at_least_float32(x: Tensor) -> Tensor:
    """Cast numbers of fewer bits to float32, and keep float64, in which tests check gradients."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _padded(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Returns weight and bias of the head, in 16 bits with rows for tokens that do not exist, of probability 0."""
    weight, bias = head.weight, head.bias
    extra = aligned(len(weight)) - len(weight) if weight.element_size() == 2 else 0
    if not extra:
        return weight, bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return F.pad(weight, (0, 0, 0, extra)), F.pad(bias, (0, extra), value=-torch.inf)
