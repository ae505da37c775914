"""Dropout whose masks may depend on keys of the samples, so that they do not depend on how a batch is split."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, as int64: the step between states of SplitMix64
_MULTIPLIERS = (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64)  # of MurmurHash3's 64-bit finalizer


class DropoutKeys(NamedTuple):
    """Keys from which `Dropout` computes its masks: an odd number for each row, and one for each channel."""

    rows: Tensor  # int32 [..., s]; `dropout_keys` returns [uses, b, s]
    columns: Tensor  # int32 [d]


class Dropout(nn.Dropout):
    """Zero each element with probability p and divide the others by 1 - p, in training.

    x: [..., s, d] -> [..., s, d], added to residual, [..., s, d], if it is given: one kernel where p > 0 and there are
    keys. Without keys the mask is drawn from torch's generator, as in nn.Dropout. With keys, of rows [..., s], the mask
    is a function of the keys and p only: it is the same on every device, in batches of any shape, and for any state of
    the generator. An element is kept if the low 32 bits of the product of its row's and its column's key are at least
    p 2^32; both are odd hashes, so each product is uniform over the odd numbers.
    Related: counter-based random numbers (Salmon et al. 2011).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__(p)

    def forward(self, x: Tensor, keys: DropoutKeys | None = None, *, residual: Tensor | None = None) -> Tensor:
        if self.training and self.p > 0:
            if keys is not None and self.p < 1:
                return _KeyedDropout.apply(x, residual, keys.rows, keys.columns, self.p)  # type: ignore[no-untyped-call]
            x = F.dropout(x, self.p)
        return x if residual is None else residual + x


class _KeyedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, rows: Tensor, columns: Tensor, p: float) -> Tensor:
        threshold = min(round(p * 2**32) - 2**31, 2**31 - 1)
        keep = rows.unsqueeze(-1) * columns >= threshold  # [..., s, d]; the products wrap around
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        if residual is not None:
            return torch.addcmul(residual, x, keep, value=ctx.scale)
        return torch.ops.aten.native_dropout_backward(x, keep, ctx.scale)  # x * keep * scale, on a GPU in one kernel

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        of_x = torch.ops.aten.native_dropout_backward(gradient, keep, ctx.scale)
        return of_x, gradient if ctx.needs_input_grad[1] else None, None, None, None


def fold_in(keys: Tensor | int, numbers: Tensor) -> Tensor:
    """Derive new keys from keys and integers, as jax.random.fold_in does: int64, of their common shape.

    Equal inputs lead to equal keys, different inputs to keys that are statistically independent. Source: SplitMix64
    (Steele et al. 2014), with the key as its state, after `numbers` + 1 steps.
    """
    return _mix((numbers + 1) * _GOLDEN + keys)


def dropout_keys(samples: Tensor, positions: Tensor, uses: int, dim: int) -> DropoutKeys:
    """Compute the keys for `uses` applications of dropout to the tokens of a batch, vectors of width dim.

    samples: int64 [b], a key for each sample; positions: [s] or [b, s], of its tokens -> rows [uses, b, s]. The mask of
    a token depends on its sample's key, its position and the use, and not on the other rows and columns of the batch.
    """
    device = samples.device
    tokens = fold_in(samples.unsqueeze(1), positions)  # [b, s]
    rows = fold_in(tokens, torch.arange(uses, device=device).view(-1, 1, 1))  # [uses, b, s]
    columns = fold_in(0, torch.arange(dim, device=device))  # [dim]
    return DropoutKeys(_odd(rows), _odd(columns))


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of int64 x by MurmurHash3's finalizer (fmix64): each bit of the result depends on all of x."""
    for multiplier in _MULTIPLIERS:
        x = (x ^ _high(x, 33)) * multiplier
    return x ^ _high(x, 33)


def _high(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; the >> of int64 fills with the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _odd(x: Tensor) -> Tensor:
    """Returns the high half of each int64 with its lowest bit set: int32."""
    return (x >> 32).to(torch.int32) | 1
