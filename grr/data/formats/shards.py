"""Captions and images in tar shards, as img2dataset writes them (CC12M); indexed once, then read by offset."""

import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grr.data.formats.joined_index import joined_index, records_of
from grr.data.formats.shard_index import Index
from grr.data.images import SUFFIXES, THUMBNAIL, Crop, load_image, thumbnail
from grr.data.pairs import Ints, Pairs, Rows, Texts, row_numbers, split_name, threshold
from grr.data.records import Records
from grr.files.regular import open_regular_file

MOST = 10**6  # shards of a range


def webdataset(
    *, shards: str, split: str | None = None, validation_fraction: float = 0.05, cache: str | None = None
) -> Pairs:
    """Read tar shards of KEY.jpg (or .png, .webp ...) with KEY.txt (or .caption, .text) or, without one, the caption of
    KEY.json; the key is the name up to the last dot.

    shards: a file, a folder, a glob (cc12m/*.tar, or cc12m/**/*.tar for folders at any depth) or a range
    (cc12m/{00000..01242}.tar). split "train" or "validation" is determined by a hash of the sample's name, so that
    adding a shard does not move samples; null is all samples. Each shard is read once to write an index of its samples
    to the folder `cache`, by default .grr_index beside the shard; an index that cannot be written is kept in memory.

    A record is a key of a shard. A key without an image, without a caption or with two of either, and a link, a folder
    or a device is skipped and counted in `records`. Raises FileNotFoundError if there is no shard; ValueError if there
    are no samples.
    """
    if split is not None and split_name("webdataset", split) == "test":
        raise ValueError('webdataset: shards have no test part, so split must be train or validation, got "test"')
    limit = threshold("webdataset", validation_fraction)
    files = find_shards(shards)
    pairs = TarShards(files, joined_index(files, cache))
    total = len(pairs)
    if split is not None:
        pairs.keep((pairs.index["places"] < np.uint64(limit)) == (split_name("webdataset", split) == "validation"))
    pairs.records.log(f"webdataset: {shards}")
    if total and not len(pairs):
        raise ValueError(
            f"webdataset: {shards} must hold samples for {split=}, got {total:,} samples and none of them with "
            f"{validation_fraction=}; set a larger part, or split=null and other shards for validation"
        )
    if not total:
        raise ValueError(f"webdataset: {shards} hold no samples; are they uncompressed tars with jpg and txt?")
    return pairs


class TarShards(Pairs):
    """Pairs whose images are byte ranges of files.

    index: the columns of `joined_index`, of all pairs of the files. Those of a split are some of its rows, and take 12
    bytes each beside the index.
    """

    records: Records

    def __init__(self, files: list[Path], index: Index) -> None:
        self.files, self.index, self.records = files, index, records_of(index)
        self._select(None)

    @property
    def skipped(self) -> int:
        """Number of records that were skipped."""
        return self.records.skipped.total()

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Keep the pairs whose row of the index is true and count the others as of another split."""
        self._select(row_numbers(rows))
        self.records.read = len(self)
        self.records.leave_out("of another split", len(rows) - len(self))

    def place(self, i: int) -> tuple[Path, int, int]:
        """Returns the file of the image of pair i, its offset there and its size in bytes."""
        row = i if self._rows is None else self._rows[i]
        column = self.index
        return self.files[column["shard_of"][row]], int(column["offsets"][row]), int(column["sizes"][row])

    def shards_of(self, pairs: Ints) -> NDArray[np.int32]:
        """Returns the number in `files` of the shard of each of some pairs."""
        return self.index["shard_of"][pairs if self._rows is None else self._rows[pairs]]

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return load_image(self.content(i), size=size, crop=crop)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return thumbnail(self.content(i), side=side)

    def content(self, i: int) -> bytes:
        """Returns the bytes of the image file of pair i. Raises OSError."""
        file, offset, size = self.place(i)
        with open_regular_file(file) as shard:
            shard.seek(offset)
            return shard.read(size)

    def _select(self, rows: Rows | None) -> None:
        self._rows = rows
        ids, captions = (
            Texts(self.index[name].data, ends[:-1], ends[1:], rows)
            for name in ("ids", "captions")
            for ends in (self.index[f"{name}_offsets"],)
        )
        image_of = self.index["image_of"]
        super().__init__(ids, captions, image_of if rows is None else image_of[rows])


def are_shards(images: str) -> bool:
    """Returns whether a path, a glob or a range names tar shards, or is a folder of some.

    Raises ValueError for a folder of shards and images, of which only the ones or the others can be meant.
    """
    folder = Path(images)
    if not folder.is_dir():
        return images.endswith(".tar")
    shards = any(folder.glob("*.tar"))
    image = next((file for file in folder.iterdir() if file.name.lower().endswith(SUFFIXES)), None) if shards else None
    if image is not None:
        raise ValueError(
            f"are_shards: a folder must hold tar shards or images, got both in {folder}, such as {image.name}; give "
            f"the shards as '{folder}/*.tar', or the images as '{folder}/*{image.suffix}'"
        )
    return shards


def find_shards(shards: str) -> list[Path]:
    """Returns the tar shards of a file, a folder, a glob or a range, sorted.

    Raises FileNotFoundError if one is missing, or if there are none.
    """
    if Path(shards).is_dir():
        shards = str(Path(shards, "*.tar"))
    patterns = list(_expand(shards))
    missing = [name for name in patterns if not any(c in name for c in "*?[") and not Path(name).is_file()]
    files = sorted({Path(name) for pattern in patterns for name in glob(pattern, recursive=True)})
    if missing or not files:
        raise FileNotFoundError(
            f"webdataset: there is no file {', '.join(missing[:3]) or shards}; shards must be a file, a folder, a glob "
            "(cc12m/*.tar) or a range (cc12m/{00000..01242}.tar)"
        )
    return files


def _expand(pattern: str) -> Iterator[str]:
    """Expand every range of a pattern: a{08..10}b -> a08b, a09b, a10b."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    if int(match[2]) - int(match[1]) > MOST:
        raise ValueError(f"webdataset: a range must name at most {MOST:,} shards, got {match[0]}; correct the range")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _expand(f"{head}{number:0{len(match[1])}d}{tail}")
