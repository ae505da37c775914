"""The initial weights of a model that was built on the meta device."""

import torch
from torch import nn

from grr.components import LoRALinear
from grr.models.towers import Tower
from grr.parallel.shard import shard_as
from grr.seeds import derive_seed


def initialize(model: nn.Module, device: torch.device, *, seed: int) -> None:
    """Allocate the parameters of a model built on the meta device, sharded or not, and draw its initial weights.

    The weights of a module depend on the seed and on its name alone: not on the number of processes, nor on the order
    in which a model is built. Each module is drawn whole on the CPU (`reset_parameters`, as torch's modules have it),
    and each process keeps its shard, so that no process ever holds more than the largest module in full. Tied
    parameters stay tied.
    A `Tower` of another library is drawn whole, as that library does.
    Raises ValueError naming the modules that hold parameters or buffers and have no reset_parameters.
    """
    towers = {name: m for name, m in model.named_modules() if isinstance(m, Tower)}
    inside = {m for tower in towers.values() for m in tower.modules() if not isinstance(m, LoRALinear)}
    owners = [(name, m) for name, m in model.named_modules() if (m._parameters or m._buffers) and m not in inside]
    stuck = [f"{name} ({type(m).__name__})" for name, m in owners if not hasattr(m, "reset_parameters")]
    if stuck:
        raise ValueError(
            f"initialize: these modules hold parameters or buffers but cannot initialize them: "
            f"{', '.join(stuck)}; give them a reset_parameters() method"
        )
    first: dict[int, tuple[nn.Module, str]] = {}  # the module and name that a parameter is first found under
    again: list[tuple[nn.Module, str, nn.Module, str]] = []  # other places of it, each with the first
    for _, module in owners:
        for key, parameter in module._parameters.items():
            if parameter is not None and first.setdefault(id(parameter), (module, key)) != (module, key):
                again.append((module, key, *first[id(parameter)]))
    model.to_empty(device=device)
    for module, key, other, other_key in again:
        module._parameters[key] = other._parameters[other_key]
    for name, module in owners:
        _draw(module, derive_seed(seed, name))
    for name, tower in towers.items():
        _draw_tower(tower, derive_seed(seed, name))


@torch.no_grad()
def _draw(module: nn.Module, seed: int) -> None:
    """Draw the parameters that a module holds itself, whole on the CPU, and copy its shard of them into place."""
    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    whole = {key: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for key, p in own.items()}
    module._parameters.update(whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.reset_parameters()  # type: ignore[operator]
    module._parameters.update(own)
    for key, parameter in own.items():
        parameter.copy_(shard_as(whole[key], parameter))


@torch.no_grad()
def _draw_tower(tower: Tower, seed: int) -> None:
    own = dict(tower.inner.named_parameters(remove_duplicate=False)) | dict(tower.inner.named_buffers())
    for key, value in tower.initial_state(seed).items():
        own[key].copy_(shard_as(value, own[key]))
