"""The manifest of a checkpoint: the size and SHA-256 of each of its files."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from grr.files.atomic import write_atomic
from grr.files.digest import sha256


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the sizes and digests of files, by name, to manifest.json."""
    write_atomic(folder / "manifest.json", json.dumps({"format": 1, "files": files}, indent=2))


def digests_of_all_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns size and SHA-256 of every file by name; each rank reads its own files, rank 0 the common ones too."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    names = [file.name for file in folder.iterdir()]
    own = [name for name in names if name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))]
    sizes = [(folder / name).stat().st_size for name in own]
    digests = _sha256_of_all(folder / name for name in own)
    files = {name: {"size": n, "sha256": digest} for name, n, digest in zip(own, sizes, digests, strict=True)}
    if not dist.is_initialized():
        return files
    shares: list[dict[str, dict[str, Any]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, files)
    return {name: entry for share in shares for name, entry in share.items()}


def find_fault(path: Path) -> str | None:
    """Returns what is wrong with the first damaged file of a checkpoint; None if the checkpoint is whole."""
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
        digests = _sha256_of_all(file for file, _, _ in files)
    except OSError as error:
        return f"{error.filename or path} cannot be read ({error.strerror})"
    for (file, _, saved), digest in zip(files, digests, strict=True):
        if digest != saved:
            return f"{file} does not have the sha256 of manifest.json"
    return None


def _sha256_of_all(files: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=8) as threads:  # hashing releases the interpreter lock
        return list(threads.map(sha256, files))
