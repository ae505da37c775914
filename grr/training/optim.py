"""The optimizer and its parameter groups."""

import functools
import itertools
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from grr.components import Block
from grr.models.towers import Tower
from grr.parallel.device import exact_dtype
from grr.parallel.shard import local
from grr.training.schedule import set_lr


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-3,
    eps: float = 1e-8,
    decay_all: bool = True,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """Build AdamW as in the paper (section 3.3): one weight decay for all parameters that are not frozen.

    With decay_all false, parameters of one axis (norms, biases, temperature) are not decayed, as in GPT-2 and later
    models. With layer_decay below 1, the learning rate of a block is multiplied by layer_decay once for each layer from
    it to the top of its tower: once for the last block, twice for the one below it, and once more than the first block
    for patches, embeddings and positions. Poolers, norms and heads above the blocks keep the full rate (Howard and
    Ruder 2018; layers are counted as in Bao et al. 2021). The fused kernel is several times faster than the default, on
    a CPU as well.

    Raises ValueError if a number is out of its range.
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
    optimizer = torch.optim.AdamW(params, betas=betas, eps=eps, fused=True)
    set_lr(optimizer, lr)
    return optimizer


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to a norm of max_norm, over all parameters of all processes; returns the norm before.

    The norm is a scalar on the device, which is not read here: one all-reduce, and no wait for the device. A norm that
    is not finite makes the gradients NaN or zero, as in `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    world = dist.get_world_size() if any(isinstance(gradient, DTensor) for gradient in gradients) else 1
    groups: dict[tuple[int, torch.dtype], list[Tensor]] = {}  # of the shards of this process
    for gradient in gradients:
        groups.setdefault((_holders(gradient, world), gradient.dtype), []).append(local(gradient))
    norms = ((get_total_norm(shards), holders) for (holders, _), shards in groups.items())
    squares = [norm.to(exact_dtype(norm.device)).square() / holders for norm, holders in norms]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    if world > 1:
        dist.all_reduce(total)
    norm = total.sqrt().to(functools.reduce(torch.promote_types, (dtype for _, dtype in groups), torch.float32))
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for (_, dtype), shards in groups.items():
        torch._foreach_mul_(shards, scale.to(dtype))
    return norm


def _holders(gradient: Tensor, world: int) -> int:
    """Returns the number of processes, of all that add to the norm, that hold the same shard of a gradient."""
    if not isinstance(gradient, DTensor):
        return world
    sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def _layers_above(model: nn.Module) -> dict[nn.Parameter, int]:
    """Returns the number of layers from each parameter to the top of its tower, its own layer included.

    A tower is a module with a list of blocks. Modules registered before that list are the lowest layer; modules
    registered after it, and those outside a tower, are left out. A shared parameter counts at its first place.
    """
    above: dict[nn.Parameter, int] = {}
    for tower in model.modules():
        if isinstance(tower, Tower):
            _count_layers(above, *_layers_of_tower(tower))
        parts = list(tower.children())
        stack = next((i for i, part in enumerate(parts) if _is_stack(part)), None)
        if stack is None:
            continue
        lowest = [*tower.parameters(recurse=False), *(p for part in parts[:stack] for p in part.parameters())]
        _count_layers(above, lowest, parts[stack].children())
    return above


def _count_layers(above: dict[nn.Parameter, int], lowest: Iterable[nn.Parameter], blocks: Iterable[nn.Module]) -> None:
    layers = [list(lowest), *(list(block.parameters()) for block in blocks)]
    for depth, layer in enumerate(reversed(layers), start=1):
        for p in layer:
            above.setdefault(p, depth)


def _layers_of_tower(tower: Tower) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """Returns the parameters of a tower of another library that precede its blocks, and the blocks."""
    first = next((p for block in tower.blocks for p in block.parameters()), None)
    return list(itertools.takewhile(lambda p: p is not first, tower.parameters())) if tower.blocks else [], tower.blocks


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(isinstance(block, Block) for block in module)
