"""Trained adapters apart from the weights they belong to: in checkpoints, and in a folder beside a model's.

What is kept is every parameter that is trained: the adapters, and the parts of the model that are trained in full.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from grr.checkpoint.model_folder import mismatches, save_model_state
from grr.components import LoRALinear
from grr.files.damage import damage
from grr.parallel.shard import shard_as, sharded_parts

FILE = "adapter.safetensors"


def trained_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a model's state dict that a model of the same base lacks: those of what is trained."""
    fixed = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in fixed}


def save_adapters(folder: Path, model: nn.Module, config: dict[str, Any], tokenizer_path: Path | None) -> None:
    """Write adapter.safetensors, config.json and, if given, tokenizer.model. Called by all processes alike."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    save_model_state(folder, trained_state(model, state), config, tokenizer_path, weights=FILE)


def load_adapters(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors that `save_adapters` wrote.

    Raises FileNotFoundError if there is no such file, ValueError if it is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"load_adapters: there is no {file}; copy the folder again")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"load_adapters: {file} cannot be read: {damage(file)}") from error


@torch.no_grad()
def apply_adapters(model: nn.Module, tensors: Mapping[str, Tensor], *, scale: float, where: str) -> None:
    """Add the updates of adapters to the weights of a model, plain or sharded, and replace what was trained in full.

    tensors: of `trained_state`, whole, equal in all processes; scale: of the updates, alpha / rank; where: the folder
    that they are from, for messages. Raises ValueError naming every tensor that does not fit the model.
    """
    parameters = _resharded(model)
    given = {name: str(list(value.shape)) for name, value in tensors.items()}
    if lines := mismatches(given, _expected(tensors, parameters), "model"):
        raise ValueError(
            f"apply_adapters: {where} does not fit the model:\n{lines}\ngive the base that the adapters were trained on"
        )
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "lora_b":
            weight = parameters[f"{layer}.weight"]
            weight.add_(shard_as(scale * (value @ tensors[f"{layer}.lora_a"]), weight))
        elif kind != "lora_a":
            parameters[name].copy_(shard_as(value, parameters[name]))


def merge_adapters(model: nn.Module) -> None:
    """Merge all adapters of a model, plain or sharded, in place (`LoRALinear.merge`). Called by all processes alike."""
    _resharded(model)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.merge()


def _resharded(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters by name, in the memory that the optimizer updates, of a sharded model as well."""
    for part in sharded_parts(model):
        part.reshard()
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def _expected(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the shapes that tensors of these names have beside a model, both matrices of an adapter included."""
    shapes: dict[str, list[int]] = {}
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        weight = parameters.get(f"{layer}.weight")
        if kind in ("lora_a", "lora_b") and weight is not None and weight.ndim == 2:
            rank = tensors.get(f"{layer}.lora_a", value).shape[0]
            shapes |= {f"{layer}.lora_a": [rank, weight.shape[1]], f"{layer}.lora_b": [weight.shape[0], rank]}
        elif name in parameters and kind not in ("lora_a", "lora_b"):
            shapes[name] = list(parameters[name].shape)
    return {name: str(shape) for name, shape in shapes.items()}
