"""The optimizer, and its learning rate as a function of the step."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from grr.components import Block
from grr.training.low_bit import LowBitAdamW


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-3,
    eps: float = 1e-8,
    decay_all: bool = True,
    layer_decay: float = 1.0,
    moments: Literal["fp32", "8bit", "4bit", "fp8"] = "fp32",
) -> torch.optim.Optimizer:
    """AdamW as the paper has it (section 3.3): one weight decay for all parameters that are not frozen.

    With decay_all false, parameters of one axis (norms, biases, temperature) are not decayed, which is the usual
    choice since GPT-2. With layer_decay below 1, the learning rate of a block is multiplied by layer_decay once for
    every layer from it to the top of its tower: once for the last block, again for each below it, and once more for
    what lies below the blocks (patches, embeddings, positions); poolers, norms and heads above them keep all of it
    (Howard and Ruder 2018; the count of layers as in Bao et al. 2021). The fused kernel is several times faster than
    the default on a CPU as well. `moments` other than fp32 keep the optimizer's two moments in 8 or 4 bits, in less
    than a third or a quarter of their memory for the paper's model (`grr.training.low_bit`): for GPUs, where torchao
    compiles the step, which on a CPU takes minutes where the fused one takes a second. Those of token embeddings stay
    whole: where a token is absent for long, a second moment rounded to 0 makes a step dozens of times too long.
    Raises ValueError if a number is out of its range, ImportError if moments of few bits are asked for without torchao.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"adamw: layer_decay must be above 0 and at most 1, got {layer_decay=}")
    if not (0 < lr < math.inf and 0 <= weight_decay < math.inf and 0 <= eps < math.inf):
        raise ValueError(
            f"adamw: lr must be above 0, weight_decay and eps at least 0, all of them finite, got {lr=}, "
            f"{weight_decay=}, {eps=}"
        )
    above = _layers_above(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            decay = weight_decay if decay_all or p.dim() > 1 else 0.0
            groups.setdefault((decay, layer_decay ** above.get(p, 0)), []).append(p)
    params = [{"params": group, "weight_decay": decay, "scale": scale} for (decay, scale), group in groups.items()]
    optimizer: torch.optim.Optimizer
    if moments == "fp32":
        optimizer = torch.optim.AdamW(params, betas=betas, eps=eps, fused=True)
    else:
        embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        optimizer = LowBitAdamW(params, moments, whole=embeddings, lr=lr, betas=betas, eps=eps)
    set_lr(optimizer, lr)
    return optimizer


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Keep the parameters of some children of the model, by name, from being trained. Before `adamw`.

    Raises ValueError for a name that the model does not have, or if nothing is left to train.
    """
    children = dict(model.named_children())
    if unknown := [part for part in parts if part not in children]:
        raise ValueError(f"freeze: the model has no part {', '.join(unknown)}; its parts are {', '.join(children)}")
    for part in parts:
        children[part].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze: nothing is left to train when {', '.join(parts)} are frozen; leave one out")


def warmup_cosine(
    step: int,
    steps_per_epoch: int,
    peak: float,
    *,
    min_lr: float = 1e-6,
    warmup_steps: int = 0,
    cycle_epochs: float = 1.0,
) -> float:
    """The learning rate of an optimizer step, counted from 0: linear warm-up, then cosine with warm restarts.

    It rises over warmup_steps to `peak`, then falls along half a cosine to min_lr, and starts again at `peak` every
    cycle_epochs epochs (Loshchilov and Hutter 2016, equation 5). Cycles are counted from step 0, so each ends with an
    epoch: the cycle in which the warm-up ends has its cosine in the steps that are left of it. The rate is a function
    of the step alone, so a resumed run needs no state. Raises ValueError if min_lr is above peak, or a length is
    negative.
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
    """Returns where a run of `last` steps ends, and whether a cosine of `warmup_cosine` ends there, as a sentence."""
    cycle = max(1, round(cycle_epochs * steps_per_epoch))
    rate = warmup_cosine(last - 1, steps_per_epoch, peak, cycle_epochs=cycle_epochs, **schedule)
    place = f"the last step is {last:,}, after {last / steps_per_epoch:g} epochs of {steps_per_epoch:,} steps"
    if last % cycle == 0:
        return f"{place}, where a cosine of the learning rate ends, at {rate:.1e}"
    whole = (last // cycle + 1) * cycle
    return f"{place}, within a cosine of the learning rate, at {rate:.1e}; the cosine ends at step {whole:,}"


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate, times the scale of the group where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a norm of max_norm, over all parameters of all processes; returns the norm before."""
    norm = clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def _layers_above(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many layers stand between a parameter and the top of its tower, its own among them.

    A tower is a module with a list of blocks. What it registers before that list is the lowest layer; what it registers
    behind it, and what belongs to no tower, is left out. A parameter in two places counts where it stands first.
    """
    above: dict[nn.Parameter, int] = {}
    for tower in model.modules():
        parts = list(tower.children())
        stack = next((i for i, part in enumerate(parts) if _is_stack(part)), None)
        if stack is None:
            continue
        lowest = [*tower.parameters(recurse=False), *(p for part in parts[:stack] for p in part.parameters())]
        layers = [lowest, *(list(block.parameters()) for block in parts[stack].children())]
        for depth, layer in enumerate(reversed(layers), start=1):
            for p in layer:
                above.setdefault(p, depth)
    return above


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(isinstance(block, Block) for block in module)
