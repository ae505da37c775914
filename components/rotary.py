"""Rotary position embeddings: queries and keys are rotated by angles proportional to their positions.

Pairing convention: channels i and i + k/2 form a pair ("halves", as in GPT-NeoX and Llama's Hugging Face weights),
not channels i and i + 1 ("interleaved", as in RoFormer and Meta's Llama weights). The two conventions differ by a fixed
permutation of the channels of each head, so weights trained with one do not fit the other: PAIRING is stored with
every saved model.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .recompute import runs_eagerly

PAIRING = "halves"


class Rotation:
    """Cosines and sines of the angles of some positions, computed once for all layers that rotate by the same angles.

    angles: float32 [..., s, k/2] -> cos and sin: float32 [..., s, k], of both channels of each pair; the sine of the
    first channel is negative. Not a tuple, because mixed precision casts the tensors in the arguments of a layer.
    """

    def __init__(self, angles: Tensor) -> None:
        cos, sin = angles.cos(), angles.sin()
        self.cos, self.sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, angles: Tensor | Rotation) -> Tensor:
    """Rotate each pair of channels (i, i + k/2) by its angle, in float32 or the dtype of x if that has more bits.

    x: [b, h, s, k], angles: float32 [..., s, k/2], broadcast over b and h, or their `Rotation` -> [b, h, s, k], same
    dtype as x. The backward pass is the rotation by the negative angles and needs nothing of x.
    """
    rotation = angles if isinstance(angles, Rotation) else Rotation(angles)
    cos, sin = rotation.cos, rotation.sin
    if cos.requires_grad or not runs_eagerly():  # angles that are learned have a gradient, which needs x
        return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
    return _Rotate.apply(x, cos, sin, 1)  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    """x * cos + swapped(x) * sin * sign in three kernels; the sum is rounded to the dtype of x by the last one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.sign = sign
        y, swapped = x * cos, x.roll(x.shape[-1] // 2, -1)
        return torch.addcmul(y, swapped, sin, value=sign, out=torch.empty_like(y, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Rotate.apply(gradient, *ctx.saved_tensors, -ctx.sign), None, None, None  # type: ignore[no-untyped-call]


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
