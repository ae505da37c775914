"""Data sets rewritten as tar shards of small JPEG files, which decode faster; `webdataset` reads them."""

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from grr.data.formats.shards import TarShards
from grr.data.images import BadImage, check_size, shrink_file
from grr.data.pairs import ImageFiles, Pairs
from grr.data.threads import in_thread
from grr.files.atomic import replace_file, write_atomic
from grr.files.lock import lock

STATE = "pack.json"  # what is packed, and the counts of each shard that is complete
MAX_SIZE = 4096  # pixels; no model is trained at more, and a squashed image of a million would fill the memory
AHEAD = 256  # images that are packed together
OTHER = "name another folder, or delete it"


@dataclass
class Counts:
    """Counts of packed data: pairs + skipped = pairs that were read; bad: first names of unreadable images, reasons."""

    images: int = 0
    pairs: int = 0
    skipped: int = 0
    bad: list[list[str]] = field(default_factory=list)


class _Image(NamedTuple):
    """Image with its captions: key is the name of its members without the suffix, pair one of its pairs."""

    key: str
    captions: list[str]
    pair: int


def pack(
    pairs: Pairs, folder: Path, *, size: int, quality: int = 90, squash: bool = False, shard_size: int = 10_000
) -> Counts:
    """Write the images and captions of a data set of files to the tar shards folder/*.tar.

    Images are stored as `shrink_file` returns them: the shorter side has `size` pixels, so every crop remains possible,
    or with `squash` both have. An image is stored once, with all its captions. Shards keep their names and keys, so ids
    and splits remain; other data are divided into shards of shard_size images, whose keys are the names of the files.
    An image that cannot be read is left out with its pairs and counted. The same call continues after a kill: shards
    that are complete are not written again.

    Raises ValueError as `check_pack` does, for data that are not image files, for two shards of one name, and if the
    folder holds other data or is being written.
    """
    check_size("pack", shard_size=shard_size)
    check_pack(size=size, quality=quality)
    if not isinstance(pairs, TarShards | ImageFiles):
        raise ValueError(
            "pack: the data must be image files or shards (folder, coco, karpathy, rocov2, webdataset), got "
            f"{type(pairs).__name__}; choose another section of the config"
        )
    shards = dict(_shards(pairs, shard_size))
    of = {"fingerprint": pairs.fingerprint, "size": size, "quality": quality, "squash": squash, "shards": list(shards)}
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        _lock(held, folder)
        done = _resume(folder, of)
        with ThreadPoolExecutor() as pool, tqdm(total=pairs.groups.count, desc="pack", unit="image", delay=1) as bar:
            for name, images in shards.items():
                if name not in done:
                    done[name] = _write(folder / f"{name}.tar", pairs, images, size, quality, squash, pool, bar)
                    state = {"of": of, "done": {name: asdict(counts) for name, counts in done.items()}}
                    write_atomic(folder / STATE, json.dumps(state))
                else:
                    bar.update(len(images))
    finally:
        os.close(held)
    total = Counts()
    for counts in done.values():
        total.images, total.pairs = total.images + counts.images, total.pairs + counts.pairs
        total.skipped, total.bad = total.skipped + counts.skipped, total.bad + counts.bad
    return total


def check_pack(*, size: int, quality: int) -> None:
    """Raise ValueError if the images of a pack cannot have a size, from 1 to 4,096 pixels, or a quality, 1 to 95."""
    if size not in range(1, MAX_SIZE + 1):
        raise ValueError(
            f"pack: size must be from 1 to {MAX_SIZE} pixels, got {size}; give the size that the model is trained at"
        )
    if quality not in range(1, 96):
        raise ValueError(f"pack: quality must be from 1 to 95, got {quality}; 90 is a good choice")


class _Images:
    """Images that are read when they are packed. rows: [n], pairs; starts: [m + 1], where each image begins in rows."""

    def __init__(self, pairs: TarShards | ImageFiles, rows: Any, starts: Any) -> None:
        self.pairs, self.rows, self.starts = pairs, rows, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[_Image]:
        for start, end in itertools.pairwise(self.starts.tolist()):
            rows = self.rows[start:end].tolist()
            if isinstance(self.pairs, TarShards):
                key = self.pairs.ids[rows[0]].removeprefix(f"{self.pairs.place(rows[0])[0].stem}/")
            else:
                key = self.pairs.images[int(self.pairs.image_of[rows[0]])]
            yield _Image(key, [self.pairs.captions[row] for row in rows], rows[0])


def _shards(pairs: TarShards | ImageFiles, shard_size: int) -> Iterator[tuple[str, _Images]]:
    """Yield the name and the images of each shard to write."""
    rows = np.argsort(pairs.image_of, kind="stable")
    starts = np.flatnonzero(np.diff(pairs.image_of[rows], prepend=-1))  # of the images
    if isinstance(pairs, TarShards):
        names = [file.stem for file in pairs.files]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"pack: shards must have different names, got two {twice}.tar; pack each of their folders separately"
            )
        shard_of = pairs.shards_of(rows[starts])
        cuts = [*(np.flatnonzero(np.diff(shard_of)) + 1).tolist()]
        names = [names[shard_of[cut]] for cut in (0, *cuts)]
    else:
        cuts = list(range(shard_size, len(starts), shard_size))
        names = [f"{number:05d}" for number in range(len(cuts) + 1)]
    bounds = np.append(starts, len(rows))
    for name, (first, last) in zip(names, itertools.pairwise((0, *cuts, len(starts))), strict=True):
        yield name, _Images(pairs, rows, bounds[first : last + 1])


def _lock(descriptor: int, folder: Path) -> None:
    try:
        lock(descriptor)
    except BlockingIOError:
        raise ValueError(f"pack: {folder} is being written by another process; wait for it, or end it") from None


def _resume(folder: Path, of: dict[str, Any]) -> dict[str, Counts]:
    """Returns the counts of the shards in a folder that are complete. Raises ValueError if it holds other data."""
    file = folder / STATE
    if not file.exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix != ".tmp")
        if others:
            raise ValueError(f"pack: {folder} must be empty or hold these data, got {', '.join(others[:3])}; {OTHER}")
        write_atomic(file, json.dumps({"of": of, "done": {}}))
    state = json.loads(file.read_text())
    if state["of"] != of:
        changed = ", ".join(key for key in of if state["of"].get(key) != of[key])
        raise ValueError(f"pack: {folder} must hold these data, got others, which differ in {changed}; {OTHER}")
    return {name: Counts(**counts) for name, counts in state["done"].items() if (folder / f"{name}.tar").exists()}


def _write(
    file: Path, pairs: Any, images: _Images, size: int, quality: int, squash: bool, pool: ThreadPoolExecutor, bar: Any
) -> Counts:
    """Write a shard to a temporary file and rename it."""
    counts = Counts()

    def read(image: _Image) -> bytes | str:
        try:
            return shrink_file(pairs.content(image.pair), size=size, quality=quality, squash=squash)
        except (BadImage, OSError) as error:
            return str(error) or type(error).__name__

    aside = file.with_name(f"{file.name}.tmp")
    with tarfile.open(aside, "w") as tar:
        waiting = iter(images)
        while some := list(itertools.islice(waiting, AHEAD)):
            for image, content in zip(some, pool.map(in_thread(read), some), strict=True):
                if isinstance(content, str):
                    counts.skipped += len(image.captions)
                    counts.bad.append([image.key, content])
                    continue
                add_member(tar, f"{image.key}.jpg", content)
                add_member(tar, *_caption_file(image))
                counts.images, counts.pairs = counts.images + 1, counts.pairs + len(image.captions)
            bar.update(len(some))
    replace_file(aside, file)
    return counts


def _caption_file(image: _Image) -> tuple[str, bytes]:
    """Returns the name and the content of the file of an image's captions: a text, or a JSON list of several."""
    text = image.captions[0]
    if len(image.captions) == 1 and not text.startswith("\ufeff"):  # which the reader takes for a byte order mark
        return f"{image.key}.txt", text.encode()
    return f"{image.key}.json", json.dumps({"caption": image.captions}, ensure_ascii=False).encode()


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to a tar, without an owner and a time."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
