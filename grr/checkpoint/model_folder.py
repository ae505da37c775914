"""Model folders: the weights, the description of the model, and the tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from grr.components import adapter_parameters
from grr.files.atomic import fsync, replace_folder, write_atomic
from grr.files.damage import damage
from grr.files.disk import disk_errors
from grr.parallel.process_group import on_rank_0


def save_model(folder: Path, model: nn.Module, config: dict[str, Any], tokenizer_path: Path | None) -> None:
    """Write what using the model needs: model.safetensors, config.json and, if given, tokenizer.model.

    The folder is written aside and renamed when it is whole. A kill between the two renames leaves the old folder as
    folder.old and the new one as folder.tmp. Called by all processes alike; rank 0 writes.
    Raises ValueError if the model has adapters that are not merged.
    """
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    adapters = {name: state.pop(name, None) for name in adapter_parameters(model)}  # rank 0 alone has the values

    def check() -> None:
        if unmerged := [name for name, value in adapters.items() if name.endswith("lora_b") and value.any()]:
            raise ValueError(
                f"save_model: adapters must be merged into the weights first, got {len(unmerged)} that are not, such "
                f"as {unmerged[0]}; call merge_adapters of grr.checkpoint.adapters, or save_adapters to keep them apart"
            )

    on_rank_0(check)
    save_model_state(folder, state, config, tokenizer_path)


def save_model_state(
    folder: Path,
    state: dict[str, Any],
    config: dict[str, Any],
    tokenizer_path: Path | None,
    *,
    weights: str = "model.safetensors",
) -> None:
    """Write the folder of `save_model` from whole tensors by their names. Called by all processes alike."""
    aside = folder.with_name(folder.name + ".tmp")

    def write() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with disk_errors(aside / weights):
            save_file(_unshared(state), aside / weights, metadata={"format": "pt"})
        fsync(aside / weights)
        write_atomic(aside / "config.json", json.dumps(config, indent=2))
        shutil.copymode(aside / "config.json", aside / weights)  # safetensors makes files that others cannot read
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, aside / "tokenizer.model")
            fsync(aside / "tokenizer.model")
        replace_folder(aside, folder)

    on_rank_0(write)


def load_model_weights(folder: Path, model: nn.Module) -> None:
    """Fill model, plain or sharded, from folder/model.safetensors; values are cast to the dtypes of the model.

    Adapters of the model are not in the file, and keep their values.

    Raises FileNotFoundError if there is no such file, ValueError if it is damaged, and naming every parameter that is
    missing, unexpected or of another shape.
    """
    file = folder / "model.safetensors"

    def shapes() -> dict[str, str]:
        if not file.is_file():
            raise FileNotFoundError(f"load_model_weights: there is no {file}; give the model folder of a finished run")
        try:
            with safe_open(file, framework="pt") as tensors:
                return {name: str(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"load_model_weights: {file} cannot be read: {damage(file)}") from error

    saved = on_rank_0(shapes)
    adapters = adapter_parameters(model)
    own: dict[str, Any] = {name: x for name, x in get_model_state_dict(model).items() if name not in adapters}
    wanted = {name: str(list(value.shape)) for name, value in own.items()}
    if lines := mismatches(saved, wanted, "model"):
        raise ValueError(
            f"load_model_weights: {file} does not fit the model:\n{lines}\n"
            "build the model that config.json beside the file describes"
        )
    fill_model(model, lambda: dict(load_file(file)))


def fill_model(model: nn.Module, read: Callable[[], dict[str, Any]], *, partial: bool = False) -> None:
    """Fill model, plain or sharded, with the state dict that `read` returns on rank 0. Called by all ranks alike.

    partial: the state dict may lack parameters of the model, which keep their values.
    Values are cast to the dtypes of the model. An error of `read` is raised on all ranks.
    """
    state: dict[str, Any] = {}
    on_rank_0(lambda: state.update(read()))
    sharded = dist.is_initialized()
    strict = not (partial or adapter_parameters(model))  # which keep their values
    options = StateDictOptions(full_state_dict=sharded, broadcast_from_rank0=sharded, strict=strict)
    set_model_state_dict(model, state, options=options)


def mismatches(saved: dict[str, str], wanted: dict[str, str], kind: str) -> str:
    """Returns a line for each name that differs between a file and a model, at most twenty; empty if all agree."""
    lines = [f"  {name}: in the {kind}, not in the file" for name in wanted if name not in saved]
    lines += [f"  {name}: in the file, not in the {kind}" for name in saved if name not in wanted]
    lines += [
        f"  {name}: {saved[name]} in the file, {wanted[name]} in the {kind}"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    return "\n".join(lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else []))


def _unshared(state: dict[str, Any]) -> dict[str, Tensor]:
    """Returns contiguous tensors, no two in the same memory, as safetensors needs them."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = value.contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return tensors
