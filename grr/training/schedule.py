"""Schedules: what changes with the optimizer step, the learning rate and patch dropout, as functions of the step."""

import math
from typing import Any

import torch
from torch import nn

from grr.components import PatchDropout


def warmup_cosine(
    step: int,
    steps_per_epoch: int,
    peak: float,
    *,
    min_lr: float = 1e-6,
    warmup_steps: int = 0,
    cycle_epochs: float = 1.0,
) -> float:
    """Compute the learning rate of an optimizer step, counted from 0: linear warm-up, then cosine with warm restarts.

    The rate rises over warmup_steps to `peak`, then falls along half a cosine to min_lr, and restarts at `peak` every
    cycle_epochs epochs (Loshchilov and Hutter 2016, equation 5). Cycles are counted from step 0, so that each ends with
    an epoch: in the cycle in which the warm-up ends, the cosine covers the remaining steps. The rate depends on the
    step alone, so a resumed run needs no state. Raises ValueError if min_lr is above peak, or a length is negative.
    """
    if min_lr > peak:
        raise ValueError(f"warmup_cosine: min_lr must not be above the optimizer's lr, got {min_lr=}, lr={peak}")
    if warmup_steps < 0 or cycle_epochs <= 0:
        raise ValueError(
            f"warmup_cosine: warmup_steps must be at least 0 and cycle_epochs above 0, got "
            f"{warmup_steps=}, {cycle_epochs=}"
        )
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    cycle = max(1, round(cycle_epochs * steps_per_epoch))
    end = (step // cycle + 1) * cycle
    start = max(end - cycle, warmup_steps)
    return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * (step - start) / (end - start))) / 2


def describe_end(last: int, steps_per_epoch: int, peak: float, *, cycle_epochs: float = 1.0, **schedule: Any) -> str:
    """Returns a clause about the end of a run of `last` steps: its epoch, and whether a cosine ends there."""
    cycle = max(1, round(cycle_epochs * steps_per_epoch))
    rate = warmup_cosine(last - 1, steps_per_epoch, peak, cycle_epochs=cycle_epochs, **schedule)
    epochs = f"{last / steps_per_epoch:.2f}".rstrip("0").rstrip(".")
    end = f"the last step is {last:,}, after {epochs} epochs of {steps_per_epoch:,} steps"
    if last % cycle == 0:
        return f"{end}; the learning rate has then fallen to {rate:.1e}, the end of its cosine"
    full = (last // cycle + 1) * cycle
    return f"{end}; the learning rate is then {rate:.1e}, and its cosine would end at step {full:,}"


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times the scale of the group where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def set_patch_dropout(model: nn.Module, p: float) -> None:
    """Set the fraction of the patches that training leaves out, of every `PatchDropout` of a model."""
    for module in model.modules():
        if isinstance(module, PatchDropout):
            module.p = p
