"""Rotary position embeddings: queries and keys are turned by angles proportional to their positions.

Pairing convention: channel i is turned together with channel i + k/2 ("halves", as in GPT-NeoX and Llama's
Hugging Face weights), not with its neighbour i + 1 ("interleaved", as in RoFormer and Meta's Llama weights). The two
differ by a fixed permutation of the channels of each head, so weights trained with one do not fit the other: PAIRING
is stored with every saved model.
"""

import math

import torch
from torch import Tensor, nn

PAIRING = "halves"


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + k/2) by its angle, in float32.

    x: [b, h, s, k], angles: float32 [..., s, k/2], broadcast over b and h -> [b, h, s, k], same dtype as x.
    """
    first, second = x.float().chunk(2, dim=-1)  # [b, h, s, k/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """One axis: pair i of position m is turned by m * base^(-2i/k).

    x: [b, h, s, k], positions: [s] or [b, s], any numbers -> [b, h, s, k]. Scores of rotated queries and keys depend
    on the difference of their positions alone. Source: Su et al. 2021 (RoFormer), equations 14 and 15.
    Raises ValueError if head_dim is odd.
    """

    axes = 1

    def __init__(self, head_dim: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"RotaryEmbedding: head_dim must be even, to be made of pairs, got {head_dim=}")
        self.head_dim, self.base = head_dim, base

    def angles(self, positions: Tensor) -> Tensor:
        """positions: [s] or [b, s] -> float32 [1, s, k/2] or [b, 1, s, k/2]."""
        frequencies = _frequencies(self.head_dim // 2, self.base, positions.device)
        return (positions.float().unsqueeze(-1) * frequencies).unsqueeze(-3)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, self.angles(positions))

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}"


class AxialRotaryEmbedding(nn.Module):
    """Two axes: the first half of the pairs turns with the row, the second half with the column.

    x: [b, h, s, k], positions: [s, 2] or [b, s, 2], (row, column) -> [b, h, s, k]. Scores depend on the difference of
    rows and on that of columns. The base is smaller than for text, since an image has tens of rows, not thousands.
    Source: Heo et al. 2024 (RoPE-ViT), equation 8, "RoPE-Axial". Raises ValueError if head_dim is not a multiple of 4.
    """

    axes = 2

    def __init__(self, head_dim: int, *, base: float = 100.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(
                f"AxialRotaryEmbedding: head_dim must be a multiple of 4, to give each axis half of its "
                f"pairs, got {head_dim=}"
            )
        self.head_dim, self.base = head_dim, base

    def angles(self, positions: Tensor) -> Tensor:
        """positions: [s, 2] or [b, s, 2] -> float32 [1, s, k/2] or [b, 1, s, k/2]."""
        frequencies = _frequencies(self.head_dim // 4, self.base, positions.device)
        return (positions.float().unsqueeze(-1) * frequencies).flatten(-2).unsqueeze(-3)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, self.angles(positions))

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}"


class MixedRotaryEmbedding(nn.Module):
    """Two axes with learned directions: pair i of head j turns by row * f[j, i, 0] + column * f[j, i, 1].

    x: [b, h, s, k], positions: [s, 2] or [b, s, 2], (row, column) -> [b, h, s, k]. The h k learned frequencies start
    with the lengths of the axial ones, in a random direction for each head, so diagonals are seen from the first step.
    Source: Heo et al. 2024 (RoPE-ViT), equation 10, "RoPE-Mixed".
    Raises ValueError if head_dim is not a multiple of 4.
    """

    axes = 2

    def __init__(self, head_dim: int, num_heads: int, *, base: float = 10.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"MixedRotaryEmbedding: head_dim must be a multiple of 4, got {head_dim=}")
        self.head_dim, self.base = head_dim, base
        self.frequencies = nn.Parameter(torch.empty(num_heads, head_dim // 2, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        length = _frequencies(self.head_dim // 4, self.base, self.frequencies.device)  # [k/4]
        direction = torch.rand(self.frequencies.shape[0], 1, device=length.device) * 2 * math.pi  # [h, 1]
        across = direction + math.pi / 2  # each length stands in two directions at a right angle
        pairs = torch.cat((_polar(length, direction), _polar(length, across)), dim=1)  # [h, k/2, 2]
        with torch.no_grad():
            self.frequencies.copy_(pairs)

    def angles(self, positions: Tensor) -> Tensor:
        """positions: [s, 2] or [b, s, 2] -> float32 [h, s, k/2] or [b, h, s, k/2]."""
        places = positions.float()[..., None, :, None, :]  # [1, s, 1, 2] or [b, 1, s, 1, 2]
        return (places * self.frequencies.float().unsqueeze(1)).sum(-1)  # no matmul: autocast would make it bfloat16

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, self.angles(positions))

    def extra_repr(self) -> str:
        return f"{self.head_dim}, num_heads={self.frequencies.shape[0]}"


def _frequencies(count: int, base: float, device: torch.device) -> Tensor:
    """base^(-i/count) for i < count. Computed at each call: a buffer would be lost on the meta device."""
    return base ** (-torch.arange(count, dtype=torch.float32, device=device) / count)


def _polar(length: Tensor, direction: Tensor) -> Tensor:
    """[k/4], [h, 1] -> vectors of these lengths and directions [h, k/4, 2]."""
    return torch.stack((length * direction.cos(), length * direction.sin()), dim=-1)
