"""Checks that weights and outputs of a model are finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from grr.parallel.shard import local

SHOWN = 3  # names in a message


def check_finite_weights(who: str, weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError, on every process, if a weight is NaN or infinite; it names the first such tensors.

    weights: plain or sharded tensors of any dtype; whole numbers pass. who: the function that speaks, where: the file
    or folder that the weights are from. If weights are sharded, all processes must call it alike.
    """
    bad = [name for name, value in weights.items() if not _is_finite(local(value.detach()))]
    if any(isinstance(value.detach(), DTensor) for value in weights.values()):
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, bad)
        found = {name for names in of_ranks for name in names}
        bad = [name for name in weights if name in found]
    if bad:
        named = ", ".join(bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
        raise ValueError(
            f"{who}: every weight must be a finite number, got NaN or infinity in {len(bad)} of {len(weights)} tensors "
            f"of {where}: {named}; training diverged, or a copy in half precision overflowed: take an earlier "
            "checkpoint, or convert the weights again in float32 or bfloat16"
        )


def check_finite_outputs(who: str, outputs: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError if an output is NaN or infinite. outputs: [b, ...], names: of its rows, for the message."""
    wrong = (~outputs.isfinite()).flatten(1).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{who}: what the model computes must be finite, got NaN or infinity for {names[row]!r}, the first of "
            f"{int(wrong.sum())} in a batch of {len(outputs)}; compute in float32 (run.bf16=false), or take another "
            "checkpoint of the model"
        )


def _is_finite(x: Tensor) -> bool:
    if not x.is_floating_point() or x.is_meta:
        return True
    if x.dtype.itemsize == 1:  # float8, of which torch cannot say it
        x = x.float()
    return bool(torch.isfinite(x).all())
