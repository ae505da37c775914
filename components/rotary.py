"""Rotary position embeddings: queries and keys are rotated by angles proportional to their positions.

Pairing convention: channels i and i + k/2 form a pair ("halves", as in GPT-NeoX and Llama's Hugging Face weights),
not channels i and i + 1 ("interleaved", as in RoFormer and Meta's Llama weights). The two conventions differ by a fixed
permutation of the channels of each head, so weights trained with one do not fit the other: PAIRING is stored with
every saved model.
"""

import math

import torch
from torch import Tensor, nn

PAIRING = "halves"


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair of channels (i, i + k/2) by its angle, in float32.

    x: [b, h, s, k], angles: float32 [..., s, k/2], broadcast over b and h -> [b, h, s, k], same dtype as x.
    """
    first, second = x.float().chunk(2, dim=-1)  # [b, h, s, k/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary embedding of one axis: pair i at position m is rotated by m * base^(-2i/k).

    x: [b, h, s, k], positions: [s] or [b, s], any numbers -> [b, h, s, k]. Scores of rotated queries and keys depend
    only on the difference of their positions. Source: Su et al. 2021 (RoFormer), equations 14 and 15.
    Raises ValueError if head_dim is odd.
    """

    axes = 1

    def __init__(self, head_dim: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"RotaryEmbedding: head_dim must be even, because channels form pairs, got {head_dim=}")
        self.head_dim, self.base = head_dim, base

    def angles(self, positions: Tensor) -> Tensor:
        """Compute the angles of positions [s] or [b, s]: float32 [1, s, k/2] or [b, 1, s, k/2]."""
        frequencies = _frequencies(self.head_dim // 2, self.base, positions.device)
        return (positions.float().unsqueeze(-1) * frequencies).unsqueeze(-3)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, self.angles(positions))

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}"


class AxialRotaryEmbedding(nn.Module):
    """Rotary embedding of two axes: the row rotates the first half of the pairs, the column the second half.

    x: [b, h, s, k], positions: [s, 2] or [b, s, 2], (row, column) -> [b, h, s, k]. Scores depend only on the
    differences of rows and of columns. The base is smaller than for text, because an image has tens of rows, not
    thousands. Source: Heo et al. 2024 (RoPE-ViT), equation 8, "RoPE-Axial". Raises ValueError if head_dim is not a
    multiple of 4.
    """

    axes = 2

    def __init__(self, head_dim: int, *, base: float = 100.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(
                "AxialRotaryEmbedding: head_dim must be a multiple of 4, because each axis rotates half of its pairs, "
                f"got {head_dim=}"
            )
        self.head_dim, self.base = head_dim, base

    def angles(self, positions: Tensor) -> Tensor:
        """Compute the angles of positions [s, 2] or [b, s, 2]: float32 [1, s, k/2] or [b, 1, s, k/2]."""
        frequencies = _frequencies(self.head_dim // 4, self.base, positions.device)
        return (positions.float().unsqueeze(-1) * frequencies).flatten(-2).unsqueeze(-3)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, self.angles(positions))

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}"


class MixedRotaryEmbedding(nn.Module):
    """Rotary embedding of two axes, learned: pair i of head j is rotated by row * f[j, i, 0] + column * f[j, i, 1].

    x: [b, h, s, k], positions: [s, 2] or [b, s, 2], (row, column) -> [b, h, s, k]. The h k frequencies are initialised
    with the lengths of the axial ones and a random direction for each head, so that diagonal differences change the
    scores from the first step. Source: Heo et al. 2024 (RoPE-ViT), equation 10, "RoPE-Mixed".
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
        orthogonal = direction + math.pi / 2  # each length occurs in two orthogonal directions
        pairs = torch.cat((_polar(length, direction), _polar(length, orthogonal)), dim=1)  # [h, k/2, 2]
        with torch.no_grad():
            self.frequencies.copy_(pairs)

    def angles(self, positions: Tensor) -> Tensor:
        """Compute the angles of positions [s, 2] or [b, s, 2]: float32 [h, s, k/2] or [b, h, s, k/2]."""
        rows_and_columns = positions.float()[..., None, :, None, :]  # [1, s, 1, 2] or [b, 1, s, 1, 2]
        products = rows_and_columns * self.frequencies.float().unsqueeze(1)
        return products.sum(-1)  # not a matmul, which autocast would compute in bfloat16

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, self.angles(positions))

    def extra_repr(self) -> str:
        return f"{self.head_dim}, num_heads={self.frequencies.shape[0]}"


def _frequencies(count: int, base: float, device: torch.device) -> Tensor:
    """Compute base^(-i/count) for i < count. Not a buffer, which would be lost on the meta device."""
    return base ** (-torch.arange(count, dtype=torch.float32, device=device) / count)


def _polar(length: Tensor, direction: Tensor) -> Tensor:
    """Returns vectors of these lengths [k/4] and directions [h, 1]: [h, k/4, 2]."""
    return torch.stack((length * direction.cos(), length * direction.sin()), dim=-1)
