"""The feed-forward networks of a block: the MLP with GELU, and the gated GEGLU and SwiGLU."""

import torch.nn.functional as F
from torch import Tensor, nn

from .recompute import call_without_keeping, recomputable


class FeedForward(nn.Module):
    """Compute GELU(x W1 + b1) W2 + b2, the MLP of ViT and CoCa.

    x: [..., d] -> [..., d]. Parameters: 2 d hidden_dim + hidden_dim + d.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = call_without_keeping(self.up, x)  # [..., hidden_dim]
        return call_without_keeping(self.down, recomputable(F.gelu, hidden))


class GEGLU(nn.Module):
    """Compute (GELU(x W + b) * (x V + c)) W2 + b2: the linear branch times the GELU branch, elementwise.

    x: [..., d] -> [..., d]. Parameters: 3 d hidden_dim + 2 hidden_dim + d. W and V are the two halves of one matrix
    (`up.weight[:hidden_dim]` is W), so both branches take one matmul. Source: Shazeer 2020, equations 5 and 6.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        both = call_without_keeping(self.up, x)  # [..., 2 hidden_dim]
        return call_without_keeping(self.down, recomputable(_gated, both))


class SwiGLU(nn.Module):
    """Compute (SiLU(x W + b) * (x V + c)) W2 + b2: a GEGLU with SiLU(y) = y sigmoid(y), also named Swish, for GELU.

    x: [..., d] -> [..., d]. Parameters: 3 d hidden_dim + 2 hidden_dim + d, without biases, as in the source, 3 d
    hidden_dim. W and V are the two halves of one matrix, as in `GEGLU`. Source: Shazeer 2020, equations 5 and 6.
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        both = call_without_keeping(self.up, x)  # [..., 2 hidden_dim]
        return call_without_keeping(self.down, recomputable(_swish_gated, both))


def _gated(both: Tensor) -> Tensor:
    gate, value = both.chunk(2, dim=-1)  # [..., hidden_dim] each
    if both.device.type == "cpu":
        gate = gate.contiguous()  # on a CPU, GELU and its gradient take twice as long on rows with gaps between them
    return F.gelu(gate) * value


def _swish_gated(both: Tensor) -> Tensor:
    gate, value = both.chunk(2, dim=-1)  # [..., hidden_dim] each
    return F.silu(gate) * value
