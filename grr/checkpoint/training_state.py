"""Checkpoints of the training state: model, optimizer and progress.

torch.distributed.checkpoint writes them, each rank its own shards, into a folder aside that is renamed when it is
whole. Every function is called by all ranks alike, or by one process without a process group.
"""

import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from grr.checkpoint.adapters import trained_state
from grr.checkpoint.manifest import digests_of_all_ranks, find_fault, write_manifest
from grr.checkpoint.model_folder import mismatches
from grr.checkpoint.safe_reader import SafePlanner, SafeReader
from grr.checkpoint.step_folders import prune
from grr.components import adapter_parameters
from grr.files.atomic import replace_folder, write_atomic
from grr.files.disk import disk_errors
from grr.parallel.process_group import on_rank_0


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    progress: dict[str, Any],
    ema: Mapping[str, Tensor] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """Write the training state to folder/step_N and remove all but the `keep` newest up to N.

    progress: JSON values; its "step", an int, is N. ema: the weights of a `grr.training.ema.EMA`, if there is one.
    Of a model with adapters, the weights that are not trained are left out: they are those of the model that the run
    began with. An optimizer that never took a step is saved, and left, without state. A kill at any moment leaves a
    whole checkpoint, if there was one. All ranks must share the folder.
    Raises ValueError for a progress without a step and for keep < 1, OSError if a file cannot be written.
    """
    step = progress.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"save_checkpoint: progress must hold the number of the step, got {step=}")
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep must be at least 1, got {keep=}")
    text = json.dumps(progress, indent=2)
    path, aside = folder / f"step_{step}", folder / f"step_{step}.tmp"

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_atomic(aside / "progress.json", text)

    on_rank_0(begin)
    with checkpoint_errors():  # one thread: torch loses the errors of its other writing threads
        state = _training_state(model, optimizer) | ({"average": dict(ema)} if ema else {})
        save(state, storage_writer=_Writer(aside, thread_count=1))
    files = digests_of_all_ranks(aside)

    def finish() -> None:
        if missing := sorted(set(files) - {file.name for file in aside.iterdir()}):
            raise OSError(
                f"save_checkpoint: rank 0 does not see {', '.join(missing)} in {aside}; "
                "the run's folder must be on a disk that all ranks share"
            )
        write_manifest(aside, files)
        replace_folder(aside, path)
        prune(folder, step, keep)

    on_rank_0(finish)
    return path


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, ema: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Load model, optimizer and ema, plain or sharded over any number of ranks, bit for bit; returns the progress.

    A model with adapters must hold the weights that the run began with.
    The optimizer's hyperparameters (lr, betas ...) become those of the checkpoint too. Gradients are dropped.
    Raises ValueError if a file is damaged, if a pickle asks for anything but metadata, if names, shapes, dtypes or
    parameter groups are not those of model and optimizer, or if only one of run and checkpoint has an EMA.
    """
    reader, saved = _open(path)
    mean = {"average": dict(ema)} if ema else {}
    if bool(mean) != _has_average(saved):
        raise ValueError(
            f"load_checkpoint: {path} was made {'without' if mean else 'with'} an EMA of weights; resume "
            "with the run.ema_decay it was made with, or set a new run.folder"
        )
    fixed = {f"average.{name}" for name, p in model.named_parameters() if not p.requires_grad}  # once in the mean
    _refuse_other_names(path, _without(saved, fixed), "model", "average.", mean.get("average", {}))
    optimizer.zero_grad(set_to_none=True)  # with a gradient left, get_state_dict would not create the optimizer's state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    groups: list[dict[str, Any]] = optimizer_state["param_groups"]  # type: ignore[assignment]
    # a parameter that never had a gradient has no state in the checkpoint, and shall have none here
    optimizer_state["state"] = {
        name: state
        for name, state in optimizer_state["state"].items()  # type: ignore[union-attr]
        if any(f"optimizer.state.{name}.{key}" in saved for key in state)  # type: ignore[union-attr]
    }
    model_state = _held(saved, model, model_state)
    _refuse_other_names(path, saved, "model", "model.", model_state)
    state: dict[str, dict[str, Any]] = optimizer_state["state"]  # type: ignore[assignment]
    flat = {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}
    _refuse_other_names(path, saved, "optimizer", "optimizer.state.", flat)
    _refuse_other_groups(path, saved, len(groups))
    for name in saved:
        if match := re.fullmatch(r"optimizer\.param_groups\.(\d+)\.(\w+)", name):
            groups[int(match[1])].setdefault(match[2], None)  # a scheduler adds initial_lr

    names = [group["params"] for group in groups]
    with checkpoint_errors():
        load({"model": model_state, "optimizer": optimizer_state} | mean, storage_reader=reader, planner=SafePlanner())
    if [group["params"] for group in groups] != names:
        raise ValueError(
            f"load_checkpoint: {path} was made with other parameter groups; resume with the optimizer section "
            "that the checkpoint was made with, or set a new run.folder"
        )
    set_model_state_dict(model, model_state, options=StateDictOptions(strict=not adapter_parameters(model)))
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=StateDictOptions(strict=False))
    return read_progress(path)


def load_checkpoint_weights(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into a model, plain or sharded: its EMA, where it has one.

    Into a model with adapters: what is trained, from a checkpoint with adapters, or all but adapters, from others.
    Raises ValueError as `load_checkpoint` does.
    """
    reader, saved = _open(path)
    state = _held(saved, model, get_model_state_dict(model))
    _refuse_other_names(path, saved, "model", "model.", state)
    with checkpoint_errors():
        load({"model": state}, storage_reader=reader, planner=SafePlanner())
    set_model_state_dict(model, state, options=StateDictOptions(strict=not adapter_parameters(model)))
    if _has_average(saved):
        parameters = model.named_parameters()
        weights = {name: parameter.detach() for name, parameter in parameters if f"average.{name}" in saved}
        _refuse_other_names(path, saved, "model", "average.", weights)
        with checkpoint_errors():
            load({"average": weights}, storage_reader=reader, planner=SafePlanner())


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint, whole and on the CPU, by name: its EMA, where it has one.

    Raises ValueError if a file is damaged.
    """
    reader, saved = _open(path)
    prefixes = ("model.", "average.")  # the later one replaces the earlier one
    found: dict[str, Tensor] = {}
    for prefix in prefixes:
        entries = {n: e for n, e in saved.items() if n.startswith(prefix) and isinstance(e, TensorStorageMetadata)}
        part = {n.removeprefix(prefix): torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items()}
        with checkpoint_errors():
            load({prefix.removesuffix("."): part}, storage_reader=reader, planner=SafePlanner(), no_dist=True)
        found |= part
    return found


def read_progress(path: Path) -> dict[str, Any]:
    """Returns the progress that a checkpoint was saved with."""
    progress: dict[str, Any] = json.loads((path / "progress.json").read_text())
    return progress


def _open(path: Path) -> tuple[SafeReader, dict[str, Any]]:
    """Returns a reader of a checkpoint, once it was found whole, and the metadata of its values by name."""
    if fault := on_rank_0(lambda: find_fault(path)):
        raise ValueError(f"load_checkpoint: {fault}; restore the file, or use another checkpoint")
    reader = SafeReader(path)
    return reader, reader.read_metadata().state_dict_metadata


def _has_average(saved: dict[str, Any]) -> bool:
    return any(name.startswith("average.") for name in saved)


def _refuse_other_names(path: Path, saved: dict[str, Any], kind: str, prefix: str, wanted: dict[str, Any]) -> None:
    """Raise ValueError unless the checkpoint holds, under this prefix, the tensors that are wanted."""
    in_file = {key.removeprefix(prefix): _kind_of(entry) for key, entry in saved.items() if key.startswith(prefix)}
    if lines := mismatches(in_file, {name: _kind_of(value) for name, value in wanted.items()}, kind):
        raise ValueError(
            f"load_checkpoint: {path} does not fit the {kind}:\n{lines}\nresume with the {kind} section that "
            "the checkpoint was made with (config.yaml in the run's folder), or set a new run.folder"
        )


def _held(saved: Mapping[str, Any], model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a model's state dict that a checkpoint holds: one with adapters what is trained alone."""
    adapters = adapter_parameters(model)
    if any(f"model.{name}" in saved for name in adapters):
        return trained_state(model, state)
    return _without(state, adapters)


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _refuse_other_groups(path: Path, saved: dict[str, Any], wanted: int) -> None:
    groups = sum(re.fullmatch(r"optimizer\.param_groups\.\d+\.params", key) is not None for key in saved)
    if groups != wanted:
        raise ValueError(
            f"load_checkpoint: {path} has {groups} parameter groups, the optimizer {wanted}; "
            "resume with the optimizer section that the checkpoint was made with, or set a new run.folder"
        )


def _kind_of(value: Any) -> str:
    """Returns dtype and shape of a value or of its entry in the metadata, as a message shows them."""
    if isinstance(value, TensorStorageMetadata):
        return f"{value.properties.dtype} {list(value.size)}"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else "no tensor"


def _training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Returns both state dicts, keyed by parameter names; tensors stay sharded.

    get_state_dict creates missing optimizer state by a step with zero gradients, which counts as Adam's first: undone.
    """
    fresh = not optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    if fresh:
        optimizer.state.clear()
        optimizer_state["state"] = {}
    if adapter_parameters(model):
        model_state = trained_state(model, model_state)
    return {"model": model_state, "optimizer": optimizer_state}


class _Writer(FileSystemWriter):
    """A writer that raises OSError on the rank where a write failed: the cause is lost between processes."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        with disk_errors(Path(self.path)):
            return super().write_data(*args, **kwargs)


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Raise the first rank's error on all ranks (torch's wrapper is not an Exception); do not warn without a group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from error
