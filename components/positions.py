"""Absolute position embeddings: a vector for each position, added to the tokens once, before the first block."""

import torch
from torch import Tensor, nn


class SinusoidalPositions(nn.Module):
    """Compute sines and cosines of wavelengths from 2 pi to 10,000 * 2 pi; the module has no parameters.

    positions: [...] -> float32 [..., d]; even channels are sines, odd ones cosines. Source: Vaswani et al. 2017,
    section 3.5. Raises ValueError if dim is odd.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"SinusoidalPositions: dim must be even, got {dim=}")
        self.dim = dim

    def forward(self, positions: Tensor) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=positions.device) / self.dim
        angles = positions.float().unsqueeze(-1) * 10_000.0**-exponents  # [..., d/2]
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.dim}"


class LearnedPositions(nn.Module):
    """Look up a learned vector for each of num_positions positions.

    positions: integers [...] below num_positions -> [..., d].
    """

    def __init__(self, dim: int, num_positions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        return self.weight[positions]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_positions={self.weight.shape[0]}"
