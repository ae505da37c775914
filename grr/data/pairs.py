"""Images with captions, by number: what a data set must offer, and how ten million captions fit into memory."""

import hashlib
import os
import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grr.data.images import THUMBNAIL, Crop, load_image, thumbnail
from grr.data.records import Records, file_name, record_captions
from grr.files.regular import read_regular_file

MAX_BYTES = 2**29  # of an image file
Ints = NDArray[np.int64]
SPLITS = {
    "train": "train",
    "restval": "train",
    "test": "test",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
}


class Texts:
    """Many strings in one block of memory: each costs its UTF-8 bytes and 16 more, no Python object.

    data: UTF-8; text i is data[starts[i]:ends[i]].
    """

    def __init__(self, data: bytes | bytearray | memoryview, starts: Ints, ends: Ints) -> None:
        self.data, self.starts, self.ends = memoryview(data), starts, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        data, ends = bytearray(), array("q", [0])
        for text in texts:
            data += text.encode("utf-8", "replace")
            ends.append(len(data))
        offsets = np.array(ends, dtype=np.int64)
        return cls(data, offsets[:-1], offsets[1:])

    def take(self, rows: NDArray[np.bool_]) -> "Texts":
        """Those texts whose row is true; the block of memory is shared."""
        return Texts(self.data, self.starts[rows], self.ends[rows])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> str:
        return str(self.data[self.starts[i] : self.ends[i]], "utf-8")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def digest(self) -> bytes:
        """A hash of the texts and their order, wherever in memory they lie."""
        digest = hashlib.blake2b((self.ends - self.starts).astype("<i8").tobytes(), digest_size=16)
        gaps = np.flatnonzero(self.starts[1:] != self.ends[:-1]) + 1  # texts between two gaps are hashed in one go
        for first, behind in zip([0, *gaps.tolist()], [*gaps.tolist(), len(self)], strict=True):
            if first < behind:
                digest.update(self.data[self.starts[first] : self.ends[behind - 1]])
        return digest.digest()


class Pairs(ABC):
    """n pairs of an image and a caption, by number. A data set of one's own is a subclass with a `load`.

    ids: names that a person can look up, the same in every run. captions: stripped, white space collapsed; an empty
    one makes a bad sample. image_of: [n], the number of the image of each pair: pairs of one image, which have the
    same number, never meet in a batch. records: what was read of the files and what was not, where there are files.
    """

    records: Records | None = None

    def __init__(self, ids: Texts, captions: Texts, image_of: Ints) -> None:
        self.ids, self.captions, self.image_of = ids, captions, image_of

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of ids and captions in their order; images are not read."""
        return hashlib.blake2b(self.ids.digest() + self.captions.digest(), digest_size=16).hexdigest()

    @abstractmethod
    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        """The image of pair i: uint8 [3, size, size]. Called from many threads at once.

        Raises BadImage or OSError if it cannot be read.
        """

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        """The image of pair i for a page: uint8 [3, h, w], the longer side at most `side` pixels.

        By default the middle of the image at that size; the data sets of this library show the whole image, and do not
        enlarge it. Raises as `load` does.
        """
        return self.load(i, size=side, crop="center")


class ImageFiles(Pairs):
    """Pairs whose images are files: image j is root / images[j]."""

    def __init__(self, root: Path, images: Texts, ids: Texts, captions: Texts, image_of: Ints) -> None:
        super().__init__(ids, captions, image_of)
        self.root, self.images = root, images

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return load_image(self._content(i), size=size, crop=crop)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return thumbnail(self._content(i), side=side)

    def _content(self, i: int) -> bytes:
        return read_regular_file(image_path(self.root, self.images[self.image_of[i]]), MAX_BYTES)


def pair_counts(training: Pairs, validation: Pairs) -> dict[str, Any]:
    """The pairs of a run, and what was read and skipped of the files they come from, for its manifest."""
    sides = {"training": training, "validation": validation}
    records = {f"{side}_records": pairs.records.facts() for side, pairs in sides.items() if pairs.records is not None}
    return {f"{side}_pairs": len(pairs) for side, pairs in sides.items()} | records


class Row(NamedTuple):
    """A record of a file."""

    image: str  # a file below the root
    captions: object  # whatever stands there
    where: str  # in which file, for messages
    split: str | None = None  # where a record names its own


def image_files(
    root: Path, rows: Iterable[Row], records: Records | None = None, belongs: Callable[[Row], bool] | None = None
) -> ImageFiles:
    """Pairs of image files and captions; the third pair of a.jpg has the id a.jpg#2. See `read_rows`."""
    return read_rows(root, rows, records, belongs)[0]


def read_rows(
    root: Path, rows: Iterable[Row], records: Records | None = None, belongs: Callable[[Row], bool] | None = None
) -> tuple[ImageFiles, Ints]:
    """Pairs of image files and captions, and for each pair the number of its row.

    Every caption of every row is counted in `records`, the pairs' own: read, skipped, or left out because its row does
    not belong. Raises ValueError, naming the place, if captions are neither a string nor a list of strings.
    """
    images: dict[str, int] = {}
    captions_of = array("q")  # image -> captions met so far
    image_of, row_of = array("q"), array("q")
    ids = bytearray()
    ends = array("q", [0])
    records = Records() if records is None else records

    def walk() -> Iterator[str]:
        for number, row in enumerate(rows):
            name, captions = file_name(row.image), record_captions(row.captions, row.where)
            if not name:
                records.skip(row.where, "names no image")
                continue
            if belongs is not None and not belongs(row._replace(image=name)):
                records.leave_out("of another split", len(captions))
                continue
            image = images.setdefault(name, len(images)) if any(captions) else -1
            if image == len(captions_of):
                captions_of.append(0)
            for caption in captions:
                if not caption:
                    records.skip(row.where, "empty caption")
                    continue
                image_of.append(image)
                row_of.append(number)
                ids.extend(f"{name}#{captions_of[image]}".encode("utf-8", "replace"))
                ends.append(len(ids))
                captions_of[image] += 1
                records.read += 1
                yield caption

    captions = Texts.of(walk())
    offsets = np.array(ends, dtype=np.int64)
    pairs = ImageFiles(
        root, Texts.of(images), Texts(ids, offsets[:-1], offsets[1:]), captions, np.array(image_of, dtype=np.int64)
    )
    pairs.records = records
    return pairs, np.array(row_of, dtype=np.int64)


def image_path(root: Path, name: str) -> Path:
    """The file of a name in composed letters (NFC): the folder may have it in decomposed ones, as macOS writes them."""
    file = root / name
    decomposed = root / unicodedata.normalize("NFD", name)
    return decomposed if decomposed != file and not os.path.lexists(file) and os.path.lexists(decomposed) else file


def split_name(who: str, split: str) -> str:
    """train, validation or test, by any of the names that data sets have for them. Raises ValueError for others."""
    if split not in SPLITS:
        raise ValueError(f"{who}: split must be train, validation or test, got {split!r}; write one of these")
    return SPLITS[split]


def place(name: str) -> int:
    """Where a name falls in [0, 2**64), evenly, and alike on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def threshold(who: str, validation_fraction: float) -> int:
    """Names that fall below are for validation, so adding images moves none across. Raises ValueError."""
    if not 0 < validation_fraction < 1:
        raise ValueError(f"{who}: validation_fraction must lie between 0 and 1, got {validation_fraction=}")
    return int(validation_fraction * 2**64)
