"""Readers of torch.distributed.checkpoint that run no code of a pickle."""

import pickle
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem


class SafeReader(FileSystemReader):
    """A reader that unpickles .metadata without running code."""

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


class SafePlanner(DefaultLoadPlanner):
    """A planner that loads values that are not tensors (lr, betas ...) weights_only; torch's own runs any pickle."""

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


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that builds the classes of a checkpoint's metadata and torch's dtypes alone."""

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
    """Returns the member of an enum by its name; refuses whatever else getattr could return."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"builtins.getattr({kind}, {name!r})")
