"""What a run leaves on disk: checkpoints of its training state, its model, and the lock that keeps it to one writer.

Training state is written by torch.distributed.checkpoint, each rank its own shards, into a folder aside that is renamed
when it is whole; manifest.json holds the size and sha256 of every file. No pickle is read in a way that could run code.
Every function is called by all ranks alike, or by one process without a process group.
"""

import fcntl
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
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

from grr.files.damage import damage
from grr.files.disk import disk_errors
from grr.parallel.process_group import all_max, on_rank_0

logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    progress: dict[str, Any],
    average: Mapping[str, Tensor] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """Write the training state to folder/step_N and remove all but the `keep` newest up to N.

    progress: JSON values; its "step", an int, is N. average: weights of a `grr.training.ema.Average`, if there is
    one. An optimizer that never stepped is saved, and left, without state.
    A kill at any moment leaves a whole checkpoint, if there was one. The folder must be one that all ranks share.
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
        _write(aside / "progress.json", text)

    on_rank_0(begin)
    with _as_wished():  # one thread: torch loses the errors of its other writing threads
        state = _training_state(model, optimizer) | ({"average": dict(average)} if average else {})
        save(state, storage_writer=_Writer(aside, thread_count=1))
    files = _digests_of_all_ranks(aside)

    def finish() -> None:
        if missing := sorted(set(files) - {file.name for file in aside.iterdir()}):
            raise OSError(
                f"save_checkpoint: rank 0 does not see {', '.join(missing)} in {aside}; "
                "the run's folder must be on a disk that all ranks share"
            )
        _write(aside / "manifest.json", json.dumps({"format": 1, "files": files}, indent=2))
        _fsync(aside)
        _install(aside, path)
        _prune(folder, step, keep)

    on_rank_0(finish)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the whole checkpoint of the highest step in folder; None if none was ever whole. Nothing is changed on disk.

    Whole means that every file has the size and sha256 of manifest.json. A damaged one is logged and passed over.
    Raises ValueError naming the faults if there are checkpoints and every one is damaged, so that a run never begins
    again at step 0 over its own log. A `.tmp` that a killed run left unfinished is not damage.
    """

    def find() -> Path | None:
        faults: list[str] = []
        for path in sorted(_checkpoints(folder), key=_rank_of_name, reverse=True):
            fault = _fault(path)
            if fault is None:
                for fault in faults:
                    logger.warning(
                        "latest_checkpoint: %s; %s is used instead (restore the file, or delete the folder)",
                        fault,
                        path,
                    )
                return path
            if path.suffix not in (".tmp", ".old"):
                faults.append(fault)
        if faults:
            raise ValueError(
                f"latest_checkpoint: every checkpoint in {folder} is damaged: {'; '.join(faults)}; restore these "
                f"files, set run.folder to a new folder, or delete {folder} to begin again at step 0"
            )
        return None

    return on_rank_0(find)


def check_checkpoint(path: Path) -> None:
    """Raise ValueError naming the fault and its remedy if a checkpoint is missing or damaged."""
    if fault := on_rank_0(lambda: _fault(path)):
        raise ValueError(
            f"check_checkpoint: {fault}; restore the file from a copy, or fine-tune one of the checkpoints in "
            f"{path.parent.parent / 'checkpoints'} (model.path) in a new run.folder"
        )


def adopt_checkpoint(path: Path) -> Path:
    """Give a whole checkpoint its own name, where a kill left it as step_N.tmp or step_N.old; returns its path.

    A damaged folder of that name gives way.
    """
    if not path.suffix:
        return path
    named = path.with_suffix("")

    def rename() -> None:
        if named.exists():
            shutil.rmtree(named)
        path.rename(named)
        _fsync(named.parent)

    on_rank_0(rename)
    return named


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left of checkpoints that were being written (.tmp) or removed (.old)."""
    on_rank_0(lambda: _remove_leftovers(folder))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, average: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Fill model, optimizer and average, plain or sharded over any number of ranks, bit for bit; return the progress.

    The optimizer's hyperparameters (lr, betas ...) become those of the checkpoint too. Gradients are dropped.
    Raises ValueError if a file is damaged, a pickle asks for anything but metadata, or names, shapes, dtypes or
    parameter groups are not those of model and optimizer, or if only one of run and checkpoint has an average.
    """
    reader, saved = _open(path)
    mean = {"average": dict(average)} if average else {}
    if bool(mean) != _has_average(saved):
        raise ValueError(
            f"load_checkpoint: {path} was made {'without' if mean else 'with'} a mean of weights; resume "
            "with the run.ema_decay it was made with, or set a new run.folder"
        )
    _refuse_other_names(path, saved, "model", "average.", mean.get("average", {}))
    optimizer.zero_grad(set_to_none=True)  # with a gradient left, get_state_dict would not create the optimizer's state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    groups: list[dict[str, Any]] = optimizer_state["param_groups"]  # type: ignore[assignment]
    # a parameter that never had a gradient has no state in the checkpoint, and shall have none here
    optimizer_state["state"] = {
        name: state
        for name, state in optimizer_state["state"].items()  # type: ignore[union-attr]
        if any(f"optimizer.state.{name}.{key}" in saved for key in state)  # type: ignore[union-attr]
    }
    _refuse_other_names(path, saved, "model", "model.", model_state)
    state: dict[str, dict[str, Any]] = optimizer_state["state"]  # type: ignore[assignment]
    flat = {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}
    _refuse_other_names(path, saved, "optimizer", "optimizer.state.", flat)
    _refuse_other_groups(path, saved, len(groups))
    for name in saved:
        if match := re.fullmatch(r"optimizer\.param_groups\.(\d+)\.(\w+)", name):
            groups[int(match[1])].setdefault(match[2], None)  # a scheduler adds initial_lr

    names = [group["params"] for group in groups]
    with _as_wished():
        load({"model": model_state, "optimizer": optimizer_state} | mean, storage_reader=reader, planner=_Planner())
    if [group["params"] for group in groups] != names:
        raise ValueError(
            f"load_checkpoint: {path} was made with other parameter groups; resume with the optimizer section "
            "that the checkpoint was made with, or set a new run.folder"
        )
    set_model_state_dict(model, model_state)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=StateDictOptions(strict=False))
    return read_progress(path)


def load_checkpoint_weights(path: Path, model: nn.Module) -> None:
    """Fill the model, plain or sharded, from a checkpoint, and leave the rest of it alone.

    Where the checkpoint has a mean of weights, the model gets that. Raises ValueError as `load_checkpoint` does.
    """
    reader, saved = _open(path)
    state = get_model_state_dict(model)
    _refuse_other_names(path, saved, "model", "model.", state)
    with _as_wished():
        load({"model": state}, storage_reader=reader, planner=_Planner())
    set_model_state_dict(model, state)
    if _has_average(saved):
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        _refuse_other_names(path, saved, "model", "average.", weights)
        with _as_wished():
            load({"average": weights}, storage_reader=reader, planner=_Planner())


def read_progress(path: Path) -> dict[str, Any]:
    """The progress that a checkpoint was saved with."""
    progress: dict[str, Any] = json.loads((path / "progress.json").read_text())
    return progress


def remove_checkpoints_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps: a run that goes on from `step` comes there again, perhaps otherwise."""

    def remove() -> None:
        for path in _checkpoints(folder):
            if _rank_of_name(path)[0] > step:
                shutil.rmtree(path)

    on_rank_0(remove)


def save_model(folder: Path, model: nn.Module, config: dict[str, Any], tokenizer_path: Path | None) -> None:
    """Write all that using the model needs: model.safetensors, config.json and, if given, tokenizer.model.

    The folder is written aside and put in place when whole; a kill between the two renames leaves both the old
    one, as folder.old, and the new one, as folder.tmp.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    save_model_state(folder, state, config, tokenizer_path)


def save_model_state(folder: Path, state: dict[str, Any], config: dict[str, Any], tokenizer_path: Path | None) -> None:
    """Write the same of weights in hand: whole tensors by their names. Called by all processes; rank 0 writes."""
    aside = folder.with_name(folder.name + ".tmp")

    def write() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with disk_errors(aside / "model.safetensors"):
            save_file(_unshared(state), aside / "model.safetensors", metadata={"format": "pt"})
        _fsync(aside / "model.safetensors")
        _write(aside / "config.json", json.dumps(config, indent=2))
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, aside / "tokenizer.model")
            _fsync(aside / "tokenizer.model")
        _fsync(aside)
        _install(aside, folder)

    on_rank_0(write)


def load_model_weights(folder: Path, model: nn.Module) -> None:
    """Fill model, plain or sharded, from folder/model.safetensors; values are cast to the dtypes of the model.

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
    wanted = {name: str(list(value.shape)) for name, value in get_model_state_dict(model).items()}  # type: ignore[union-attr]
    if mismatches := _mismatches(saved, wanted, "model"):
        raise ValueError(
            f"load_model_weights: {file} does not fit the model:\n{mismatches}\n"
            "build the model that config.json beside the file describes"
        )
    sharded = dist.is_initialized()
    state: dict[str, Any] = dict(load_file(file)) if not sharded or dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=sharded, broadcast_from_rank0=sharded))


class RunLock:
    """Hold folder/.lock for this run until release, the end of a with statement, or the death of rank 0.

    patience: seconds to wait for a run that is just ending. To be made after the process group.
    Raises BlockingIOError, an OSError, on every rank if another run holds the folder.
    """

    def __init__(self, folder: Path, *, patience: float = 10.0) -> None:
        self._file: IO[str] | None = None
        on_rank_0(lambda: self._take(folder / ".lock", patience))

    def release(self) -> None:
        if self._file is not None:
            self._file.close()  # the system drops the lock with the last descriptor
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self, path: Path, patience: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise BlockingIOError(
                    f"RunLock: {path.parent} is being written by {holder}; "
                    "wait for that run, end it (kill the process), or set another folder to write to"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file


class StopSignal:
    """Note a request to stop, so that a loop can save and leave: SIGTERM, the first SIGINT, or the death of torchrun.

    A second SIGINT raises KeyboardInterrupt. To be made in the main thread of every rank.
    """

    def __init__(self) -> None:
        self._status = 0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    @property
    def status(self) -> int:
        """What this process was asked for: 0, or the exit status of an interrupted run.

        130 after SIGINT, 143 after SIGTERM, and 143 for a worker that outlived its torchrun: no one would stop it.
        """
        if not self._status and self._launcher is not None and os.getppid() != self._launcher:
            self._status = 128 + signal.SIGTERM
        return self._status

    def requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it together and get the same answer."""
        self._status = all_max(self.status)
        return self._status > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._status = 128 + number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _write(file: Path, text: str) -> None:
    file.write_text(text)
    _fsync(file)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _as_wished() -> Iterator[None]:
    """Raise, on all ranks, the first rank's error itself (torch's wrapper is no Exception); no warning if no group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from error


def _training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Both state dicts, keyed by parameter names; tensors stay sharded.

    get_state_dict creates missing optimizer state by a step with zero gradients, which counts as Adam's first: undone.
    """
    fresh = not optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    if fresh:
        optimizer.state.clear()
        optimizer_state["state"] = {}
    return {"model": model_state, "optimizer": optimizer_state}


def _digests_of_all_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file by name; each rank reads the files it wrote, rank 0 the common ones too."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    names = [file.name for file in folder.iterdir()]
    own = [name for name in names if name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))]
    sizes = [(folder / name).stat().st_size for name in own]
    digests = _sha256(folder / name for name in own)
    files = {name: {"size": n, "sha256": digest} for name, n, digest in zip(own, sizes, digests, strict=True)}
    if not dist.is_initialized():
        return files
    shares: list[dict[str, dict[str, Any]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, files)
    return {name: entry for share in shares for name, entry in share.items()}


def _sha256(files: Iterable[Path]) -> list[str]:
    def digest(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=8) as threads:  # hashing lets go of the interpreter lock
        return list(threads.map(digest, files))


def _install(aside: Path, folder: Path) -> None:
    """Put the whole folder aside in the place of folder; at any moment one of folder, .tmp and .old is whole."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in folder, and what may be one: .tmp was being written, .old was being removed."""
    return [
        path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+(\.tmp|\.old)?", path.name) and path.is_dir()
    ]


def _rank_of_name(path: Path) -> tuple[int, int]:
    return int(path.stem.removeprefix("step_")), [".old", ".tmp", ""].index(path.suffix)


def _remove_leftovers(folder: Path) -> None:
    for path in _checkpoints(folder):
        if path.suffix:
            shutil.rmtree(path, ignore_errors=True)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove what killed runs left, and all but the `keep` newest checkpoints up to step."""
    _remove_leftovers(folder)
    paths = sorted(_checkpoints(folder), key=_rank_of_name, reverse=True)
    whole = [path for path in paths if _rank_of_name(path)[0] <= step]
    for path in whole[keep:]:
        shutil.rmtree(path.rename(path.with_suffix(".old")), ignore_errors=True)


def _fault(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, naming the first at fault; None if it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = [(path / name, int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()]
    except FileNotFoundError:
        return f"{path / 'manifest.json'} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path / 'manifest.json'} is damaged"
    if not {"progress.json", ".metadata"} <= {file.name for file, _, _ in files}:
        return f"{path / 'manifest.json'} does not name every file of a checkpoint"
    if outside := next((file for file, _, _ in files if file.parent != path), None):
        return f"{path / 'manifest.json'} names {outside}, which is outside of the checkpoint"
    for file, size, _ in files:
        if not file.is_file():
            return f"{file} is missing"
        if (found := file.stat().st_size) != size:
            return f"{file} has {found} bytes where manifest.json says {size}"
    try:
        digests = _sha256(file for file, _, _ in files)
    except OSError as error:
        return f"{error.filename or path} cannot be read ({error.strerror})"
    for (file, _, saved), digest in zip(files, digests, strict=True):
        if digest != saved:
            return f"{file} does not have the sha256 of manifest.json"
    return None


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes of a checkpoint's metadata and torch's dtypes; refuses every other name."""

    _ALLOWED = frozenset(
        {("torch", "Size"), ("torch.serialization", "_get_layout")}
        | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
        | {(module, "PosixPath") for module in ("pathlib", "pathlib._local")}
        | {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("builtins", "getattr"):  # as Python 3.11.0 to 3.11.3 wrote members of an enum
            return _member
        raise pickle.UnpicklingError(f"{module}.{name}")


def _member(kind: Any, name: Any) -> Any:
    """The member of an enum by its name, and nothing else that getattr could find."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"builtins.getattr({kind}, {name!r})")


class _Writer(FileSystemWriter):
    """Reports a write that failed as OSError, on the rank where it failed: the cause is lost between processes."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        with disk_errors(Path(self.path)):
            return super().write_data(*args, **kwargs)


class _Reader(FileSystemReader):
    """Reads .metadata, which is a pickle, without running what it may ask for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"load_checkpoint: {file} asks for {error}, which no checkpoint needs; "
                "it was not written by save_checkpoint: do not use it"
            ) from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"load_checkpoint: {file} must hold a Metadata, got {type(metadata).__name__}")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Planner(DefaultLoadPlanner):
    """Reads the values that are no tensors (lr, betas ...) weights_only; torch's own planner runs any pickle there."""

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(
                f"load_checkpoint: {read_item.dest_index.fqn} is not a plain value; "
                "it was not written by a run of ours: do not use this checkpoint"
            ) from None
        *path, last = self.mappings[read_item.dest_index.fqn]
        place: Any = self.original_state_dict
        for key in path:
            place = place[key]
        place[last] = plain


def _open(path: Path) -> tuple["_Reader", dict[str, Any]]:
    """A reader of a checkpoint that was found whole, and what is in it by name."""
    if fault := on_rank_0(lambda: _fault(path)):
        raise ValueError(f"load_checkpoint: {fault}; restore the file, or use another checkpoint")
    reader = _Reader(path)
    return reader, reader.read_metadata().state_dict_metadata


def _has_average(saved: dict[str, Any]) -> bool:
    return any(name.startswith("average.") for name in saved)


def _refuse_other_names(path: Path, saved: dict[str, Any], kind: str, prefix: str, wanted: dict[str, Any]) -> None:
    """Raise ValueError unless the checkpoint holds, under this prefix, the tensors that are wanted."""
    in_file = {key.removeprefix(prefix): _kind_of(entry) for key, entry in saved.items() if key.startswith(prefix)}
    if mismatches := _mismatches(in_file, {name: _kind_of(value) for name, value in wanted.items()}, kind):
        raise ValueError(
            f"load_checkpoint: {path} does not fit the {kind}:\n{mismatches}\nresume with the {kind} section that "
            "the checkpoint was made with (config.yaml in the run's folder), or set a new run.folder"
        )


def _refuse_other_groups(path: Path, saved: dict[str, Any], wanted: int) -> None:
    groups = sum(re.fullmatch(r"optimizer\.param_groups\.\d+\.params", key) is not None for key in saved)
    if groups != wanted:
        raise ValueError(
            f"load_checkpoint: {path} has {groups} parameter groups, the optimizer {wanted}; "
            "resume with the optimizer section that the checkpoint was made with, or set a new run.folder"
        )


def _kind_of(value: Any) -> str:
    """What must agree between a value and its entry in the metadata, as a message shows it."""
    if isinstance(value, TensorStorageMetadata):
        return f"{value.properties.dtype} {list(value.size)}"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else "no tensor"


def _mismatches(saved: dict[str, str], wanted: dict[str, str], kind: str) -> str:
    """One line for each name that is not the same on both sides, the first twenty of them; empty if all agree."""
    lines = [f"  {name}: in the {kind}, not in the file" for name in wanted if name not in saved]
    lines += [f"  {name}: in the file, not in the {kind}" for name in saved if name not in wanted]
    lines += [
        f"  {name}: {saved[name]} in the file, {wanted[name]} in the {kind}"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    return "\n".join(lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else []))


def _unshared(state: dict[str, Any]) -> dict[str, Tensor]:
    """Contiguous tensors, no two in the same memory, as safetensors wants them."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = value.contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return tensors
