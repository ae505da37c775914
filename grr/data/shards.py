"""Captions and images in tar shards, as img2dataset writes them (CC12M): indexed once, then read by offset."""

import hashlib
import json
import logging
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from grr.data.pairs import Ints, Pairs, Texts, clean, place, split_name, threshold
from grr.images import Crop, load_image

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
LAYOUT = 1  # of an index file; a file of another layout is made again
Index = dict[str, NDArray[Any]]


def webdataset(*, shards: str, split: str | None = None, validation_fraction: float = 0.05,
               cache: str | None = None) -> Pairs:  # fmt: skip
    """Tar shards of KEY.jpg with KEY.txt or, without one, the caption of KEY.json.

    shards: a file, a folder, a glob (cc12m/*.tar) or a range (cc12m/{00000..01242}.tar). split "train" or "validation"
    is drawn by a hash of the sample's name, so that a shard that is added moves no sample; null takes all. Each shard
    is read once to note where its samples lie, in a file of the folder `cache`: by default .grr_index beside the
    shard, or in the temporary folder if that cannot be written to. Samples without an image are left out, and counted
    in `skipped`. Raises FileNotFoundError if there is no shard, ValueError if there are no samples.
    """
    if split is not None and split_name("webdataset", split) == "test":
        raise ValueError('webdataset: shards have no test part, so split must be train or validation, got "test"')
    below = threshold("webdataset", validation_fraction)
    files = _files(shards)
    first = os.getpid() % len(files)
    for file in tqdm(files[first:] + files[:first], desc="webdataset: index", unit="shard", delay=2):
        _index(file, cache)  # processes that start together begin at different shards, and share the work
    pairs = TarShards(files, [_index(file, cache) for file in files])
    if split is not None:
        pairs.keep((pairs.places < np.uint64(below)) == (split_name("webdataset", split) == "validation"))
    if pairs.skipped:
        logger.warning("webdataset: %d samples of %s have no image and are left out", pairs.skipped, shards)
    if not len(pairs):
        raise ValueError(
            f"webdataset: {shards} hold no samples for {split=}; are they uncompressed tars with jpg and txt?"
        )
    return pairs


class TarShards(Pairs):
    """Pairs whose images are byte ranges of files: shard_of, offset, size: [n]. places: [n], a hash of each id."""

    def __init__(self, files: list[Path], indexes: list[Index]) -> None:
        ids, captions = (_join(indexes, name) for name in ("ids", "captions"))
        super().__init__(ids, captions, np.arange(len(ids), dtype=np.int64))
        self.files = files
        self.skipped = sum(int(index["skipped"]) for index in indexes)
        self.shard_of = np.repeat(np.arange(len(files), dtype=np.int32), [len(index["offsets"]) for index in indexes])
        self.offsets, self.sizes, self.places = (
            np.concatenate([index[name] for index in indexes]) for name in ("offsets", "sizes", "places")
        )

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Forget the pairs whose row is false."""
        self.ids, self.captions = self.ids.take(rows), self.captions.take(rows)
        self.image_of, self.shard_of = self.image_of[rows], self.shard_of[rows]
        self.offsets, self.sizes, self.places = self.offsets[rows], self.sizes[rows], self.places[rows]

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        with open(self.files[self.shard_of[i]], "rb", buffering=0) as shard:
            shard.seek(self.offsets[i])
            return load_image(shard.read(self.sizes[i]), size=size, crop=crop)


def _files(shards: str) -> list[Path]:
    if Path(shards).is_dir():
        shards = str(Path(shards, "*.tar"))
    named = list(_expand(shards))
    missing = [name for name in named if not any(c in name for c in "*?[") and not Path(name).is_file()]
    files = sorted({Path(found) for name in named for found in glob(name)})
    if missing or not files:
        raise FileNotFoundError(
            f"webdataset: there is no file {', '.join(missing[:3]) or shards}; shards must be a file, a folder, a glob "
            "(cc12m/*.tar) or a range (cc12m/{00000..01242}.tar)"
        )
    return files


def _expand(pattern: str) -> Iterator[str]:
    """a{08..10}b -> a08b, a09b, a10b, for every range in the pattern."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        yield pattern
        return
    for number in range(int(found[1]), int(found[2]) + 1):
        head, tail = pattern[: found.start()], pattern[found.end() :]
        yield from _expand(f"{head}{number:0{len(found[1])}d}{tail}")


def _index(shard: Path, cache: str | None) -> Index:
    """Where the samples of a shard lie: from its index file, or read and written there if that is older."""
    stat = shard.stat()
    state = np.array([LAYOUT, stat.st_size, stat.st_mtime_ns])
    for folder in _cache_folders(shard, cache):
        try:
            with np.load(folder / f"{shard.name}.npz", allow_pickle=False) as file:
                if np.array_equal(file["state"], state):
                    return dict(file)
        except Exception:  # absent, or damaged in one of the many ways of a zip file: made again
            continue
    index = _read_shard(shard) | {"state": state}
    for folder in _cache_folders(shard, cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as aside:
                np.savez(aside, **index)  # type: ignore[arg-type]
            os.replace(aside.name, folder / f"{shard.name}.npz")
            break
        except OSError as error:
            logger.info("webdataset: cannot write to %s (%s)", folder, error)
    return index


def _cache_folders(shard: Path, cache: str | None) -> list[Path]:
    """Where the index of a shard may lie; folders that serve many data sets keep those apart by a hash of the place."""
    home = hashlib.blake2b(str(shard.parent.resolve()).encode(), digest_size=8).hexdigest()
    if cache is not None:
        return [Path(cache, home)]
    return [shard.parent / ".grr_index", Path(tempfile.gettempdir(), f"grr_index_{os.getuid()}", home)]


def _read_shard(shard: Path) -> Index:
    images: dict[str, tuple[int, int]] = {}  # key -> offset, size
    texts: dict[str, str] = {}
    jsons: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
                if extension in IMAGES:
                    images[key] = member.offset_data, member.size
                elif extension in ("txt", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    (texts if extension == "txt" else jsons)[key] = content.read().decode("utf-8", "replace")
    except (tarfile.TarError, EOFError, OSError) as error:
        logger.warning("webdataset: %s is damaged (%s); what stands before is used", shard, error)
    captions = (texts[key] if key in texts else _caption(jsons.get(key, "")) for key in images)
    ids = [f"{shard.stem}/{key}" for key in images]
    where = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    index = {
        "offsets": where[:, 0],
        "sizes": where[:, 1],
        "places": np.array([place(name) for name in ids], dtype=np.uint64),
        "skipped": np.array(len((texts.keys() | jsons.keys()) - images.keys())),
    }
    for name, column in (("ids", Texts.of(ids)), ("captions", Texts.of(clean(c) for c in captions))):
        index |= {name: np.frombuffer(column.data, dtype=np.uint8), f"{name}_ends": column.ends}
    return index


def _caption(content: str) -> object:
    """The caption of an img2dataset record, nothing if there is none."""
    try:
        return json.loads(content)["caption"]
    except (ValueError, KeyError, TypeError):
        return None


def _join(indexes: list[Index], name: str) -> Texts:
    lengths = np.concatenate([np.diff(index[f"{name}_ends"], prepend=0) for index in indexes])
    ends: Ints = np.cumsum(lengths, dtype=np.int64)
    return Texts(b"".join(index[name].data for index in indexes), ends - lengths, ends)
