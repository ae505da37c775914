"""Index of many shards as one file, which the processes of a host map into memory and share."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from grr.data.formats.shard_index import Index, cache_folder, make_cache_folder, shard_index
from grr.data.records import Records
from grr.files.atomic import replace_file
from grr.files.columns import map_columns, write_columns
from grr.files.lock import lock

LAYOUT = 1  # of a joined index; a file of another layout has another name
SUFFIX = ".joined"
UNUSED = 90 * 86_400  # seconds after which a joined index that no process has opened is removed
CHUNK = 2**16  # pairs that are checked at a time
COLUMNS = {
    "ids": np.uint8,  # UTF-8; text i is [offsets[i], offsets[i + 1])
    "ids_offsets": np.int64,  # [n + 1]
    "captions": np.uint8,
    "captions_offsets": np.int64,  # [n + 1]
    "image_of": np.int64,
    "shard_of": np.int32,
    "offsets": np.int64,  # of the image in its shard
    "sizes": np.int64,
    "places": np.uint64,  # hashes of the samples' names
    "records": np.uint8,  # JSON: for each shard, the facts of its records
}

logger = logging.getLogger(__name__)


def joined_index(files: list[Path], cache: str | None) -> Index:
    """Returns the COLUMNS of all pairs of some shards, mapped from a file that is written first if there is none.

    The file is in the folder of the first shard's index. Its name is a hash of the names, sizes and times of the
    shards, so it is never out of date. One process writes it, while the others wait. If it cannot be written, the
    arrays are in the memory of this process.
    """
    states = [file.stat() for file in files]
    folder = cache_folder(files[0], cache)
    names = [os.path.relpath(file, files[0].parent) for file in files]
    key = [LAYOUT, *((name, state.st_size, state.st_mtime_ns) for name, state in zip(names, states, strict=True))]
    file = folder / f"{hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()}{SUFFIX}"
    limits = np.array([state.st_size for state in states])
    if (index := _open(file, limits)) is not None:
        return index
    parts = _Parts(files, cache)
    try:
        make_cache_folder(folder)
        _remove_unused(folder)
        with _one_process(folder):
            if (index := _open(file, limits)) is not None:  # another process has written it
                return index
            _write(file, parts)
        if (index := _open(file, limits)) is not None:
            return index
        raise OSError("it cannot be read back")
    except OSError as error:
        if parts.are_saved:  # otherwise there is a warning already
            message = (
                "webdataset: the index of %d shards is kept in the memory of each process, because %s cannot be "
                "written (%s); set data.cache to a folder"
            )
            logger.warning(message, len(files), folder, error)
        return parts.in_memory()


class _Parts:
    """The indexes of the shards, of which only those without a file are kept in memory."""

    def __init__(self, files: list[Path], cache: str | None) -> None:
        self.files, self.cache = files, cache
        self._kept: dict[Path, Index] = {}
        counts, facts = dict[Path, list[int]](), dict[Path, bytes]()
        first = os.getpid() % len(files)  # processes that start together begin at different shards
        for file in tqdm(files[first:] + files[:first], desc="webdataset: index", unit="shard", delay=2):
            index, saved = shard_index(file, cache)
            if not saved:
                self._kept[file] = index
            images = int(index["image_of"][-1]) + 1 if len(index["image_of"]) else 0
            facts[file] = index["records"].tobytes()
            counts[file] = [len(index["offsets"]), len(index["ids"]), len(index["captions"]), images]
        self.counts = np.array([counts[file] for file in files])  # [shards, 4]
        self._records = np.frombuffer(b"[" + b",".join(facts[file] for file in files) + b"]", dtype=np.uint8)
        self.are_saved = not self._kept

    def columns(self) -> dict[str, tuple[Any, int]]:
        """Returns the dtype and the count of each column."""
        n, ids, captions, _ = self.counts.sum(0).tolist()
        counts = {"ids": ids, "captions": captions, "ids_offsets": n + 1, "captions_offsets": n + 1}
        counts["records"] = len(self._records)
        return {name: (dtype, counts.get(name, n)) for name, dtype in COLUMNS.items()}

    def __iter__(self) -> Iterator[Index]:
        """Yield the elements of the columns that come from each shard, after those that come from none."""
        zero = np.zeros(1, dtype=np.int64)
        yield {"ids_offsets": zero, "captions_offsets": zero, "records": self._records}
        starts = np.cumsum(self.counts, axis=0) - self.counts
        for number, (index, (_, ids, captions, images)) in enumerate(zip(self._indexes(), starts, strict=True)):
            yield {
                "ids": index["ids"],
                "ids_offsets": index["ids_ends"] + ids,
                "captions": index["captions"],
                "captions_offsets": index["captions_ends"] + captions,
                "image_of": index["image_of"] + images,
                "shard_of": np.full(len(index["offsets"]), number, dtype=np.int32),
                **{name: index[name] for name in ("offsets", "sizes", "places")},
            }

    def in_memory(self) -> Index:
        """Returns the columns as arrays of this process."""
        parts = list(self)
        return {
            name: np.concatenate([part[name] for part in parts if name in part]).astype(dtype, copy=False)
            for name, dtype in COLUMNS.items()
        }

    def _indexes(self) -> Iterator[Index]:
        for file in self.files:
            yield self._kept[file] if file in self._kept else shard_index(file, self.cache)[0]


def records_of(index: Index) -> Records:
    """Returns the counts of the records of all shards."""
    records = Records()
    for facts in json.loads(index["records"].tobytes()):
        records.add(Records.of_facts(facts))
    return records


def _open(file: Path, limits: NDArray[np.int64]) -> Index | None:
    """Returns the columns of a file, or None if it does not exist or is damaged."""
    with contextlib.suppress(Exception):
        index = map_columns(file)
        _check(index, limits)
        with contextlib.suppress(OSError):
            os.utime(file)  # used now
        return index
    return None


def _check(index: Index, limits: NDArray[np.int64]) -> None:
    """Raise an error if the columns do not fit each other or the sizes of the shards: limits [shards]."""
    n = len(index["offsets"])
    whole = all(index[name].dtype == kind for name, kind in COLUMNS.items())
    whole &= all(len(index[name]) == n for name in ("image_of", "shard_of", "sizes", "places"))
    for start in range(0, n, CHUNK):
        rows = slice(start, start + CHUNK)
        offsets, sizes, shards = (index[name][rows] for name in ("offsets", "sizes", "shard_of"))
        whole &= bool(((offsets >= 0) & (sizes >= 0) & (sizes <= limits[shards] - offsets)).all())
        steps = np.diff(index["image_of"][max(0, start - 1) : start + CHUNK])
        whole &= bool(((steps == 0) | (steps == 1)).all())
    for name in ("ids", "captions"):
        text, ends = index[name], index[f"{name}_offsets"]
        whole &= len(ends) == n + 1 and int(ends[0]) == 0 and int(ends[-1]) == len(text)
        for start in range(0, n, CHUNK):
            chunk = ends[start : start + CHUNK + 1]
            whole &= bool((np.diff(chunk) >= 0).all())
            str(text[chunk[0] : chunk[-1]].data, "utf-8")
    if not whole or (n and int(index["image_of"][0]) != 0):
        raise ValueError("index: its columns do not fit each other")
    records_of(index)


def _write(file: Path, parts: _Parts) -> None:
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}.", suffix=".tmp", delete=False) as aside:
        try:
            write_columns(aside.file, parts.columns(), parts)  # type: ignore[arg-type]
            aside.close()
            replace_file(Path(aside.name), file)
        except BaseException:
            os.unlink(aside.name)
            raise


def _remove_unused(folder: Path) -> None:
    for file in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - file.lstat().st_mtime > UNUSED:
                file.unlink()


@contextlib.contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; the end of a process releases it. Where a file system has no locks, there is none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)
