"""The optimizer, and its learning rate as a function of the step."""

import math

import torch
from torch import nn


def adamw(model: nn.Module, *, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 1e-3,
          eps: float = 1e-8, decay_all: bool = True) -> torch.optim.AdamW:  # fmt: skip
    """AdamW as the paper has it (section 3.3): one weight decay for all parameters.

    With decay_all false, parameters of one axis (norms, biases, temperature) are not decayed, which is the usual
    choice since GPT-2. The fused kernel is several times faster than the default on a CPU as well.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if decay_all or p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not decay_all and p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def warmup_cosine(step: int, steps_per_epoch: int, peak: float, *, min_lr: float = 1e-6, warmup_steps: int = 0,
                  cycle_epochs: float = 1.0) -> float:  # fmt: skip
    """The learning rate of an optimizer step, counted from 0: linear warm-up, then cosine with warm restarts.

    It rises over warmup_steps to `peak`, then falls along half a cosine to min_lr, and starts again at `peak` every
    cycle_epochs epochs (Loshchilov and Hutter 2016, equation 5). Nothing is remembered between steps, so a resumed run
    needs no state. Raises ValueError if min_lr is above peak, or a length is negative.
    """
    if min_lr > peak:
        raise ValueError(f"warmup_cosine: min_lr must not be above the optimizer's lr, got {min_lr=}, lr={peak}")
    if warmup_steps < 0 or cycle_epochs <= 0:
        raise ValueError(f"warmup_cosine: warmup_steps must be at least 0 and cycle_epochs above 0, got "
                         f"{warmup_steps=}, {cycle_epochs=}")  # fmt: skip
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    cycle = max(1, round(cycle_epochs * steps_per_epoch))
    done = (step - warmup_steps) % cycle / cycle
    return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
