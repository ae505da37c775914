"""Normalisation over the last axis. `LayerNorm` is that of torch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LayerNorm as LayerNorm


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale each channel.

    x: [..., d] -> [..., d], same dtype as x: x / sqrt(mean(x^2) + eps) * weight. torch's fused kernel takes the mean in
    float32, because squares of bfloat16 activations lose too many bits to average; it is several times faster than
    the formula in separate operations. Source: Zhang and Sennrich 2019, equation 4.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)  # the fused kernel needs one dtype

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"
