"""Normalisation over the last axis. `LayerNorm` is that of torch."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LayerNorm as LayerNorm

from .recompute import recomputable, runs_eagerly


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale each channel.

    x: [..., d] -> [..., d], same dtype as x: x / sqrt(mean(x^2) + eps) * weight. torch's fused kernel takes the mean in
    float32, because squares of bfloat16 activations lose too many bits to average; it is several times faster than
    the formula in separate operations. A linear layer that follows need not keep the output for its gradient
    (`call_without_keeping`). Source: Zhang and Sennrich 2019, equation 4.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return recomputable(functools.partial(_rms_norm, eps=self.eps), x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalise by torch's fused kernel, which needs one dtype; on a CPU its gradient is one of many operations."""
    if x.device.type == "cpu" and torch.is_grad_enabled() and runs_eagerly():
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """The gradient in closed form, in float32 or more: with n = x / rms, (g w - n mean(g w n)) / rms and sum(g n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        d, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        g, w = gradient.to(wide), weight.to(wide)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()  # [..., 1]
        inverse = (squares / d + ctx.eps).rsqrt()
        n = x * inverse  # [..., d]
        gn = g * n
        of_x = torch.addcmul(g * w, n, (gn @ w).unsqueeze(-1), value=-1 / d) * inverse
        return of_x.to(x.dtype), gn.flatten(0, -2).sum(0).to(weight.dtype), None
