"""Pairs of an image and a caption: the interface of data sets, and captions in one block of memory."""

import contextlib
import hashlib
import os
import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grr.data.image_inputs import read_image, read_thumbnail
from grr.data.images import THUMBNAIL, BadImage, Crop, load_image, thumbnail
from grr.data.map_dataset import Field, MapDataset, check_map_style, read_captions, read_sample
from grr.data.order import Groups
from grr.data.records import Records, file_name, record_captions
from grr.files.regular import read_regular_file

MAX_BYTES = 2**29  # of an image file
CHUNK = 2**16  # pairs for which numbers are computed at a time, so that temporary arrays are small
Ints = NDArray[np.int64]
SPLITS = {"train": "train", "restval": "train", "test": "test"}
SPLITS |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation")


Rows = NDArray[np.unsignedinteger[Any]]


def row_numbers(rows: NDArray[np.bool_]) -> Rows:
    """Returns the numbers of the rows that are true, 4 bytes each where they fit."""
    dtype: type[np.unsignedinteger[Any]] = np.uint32 if len(rows) <= 2**32 else np.uint64
    result = np.empty(int(np.count_nonzero(rows)), dtype=dtype)
    filled = 0
    for start in range(0, len(rows), CHUNK):
        chosen = np.flatnonzero(rows[start : start + CHUNK]) + start
        result[filled : filled + len(chosen)] = chosen
        filled += len(chosen)
    return result


class Texts:
    """Sequence of strings in one block of memory: each takes its UTF-8 bytes and 8 more, without a Python object.

    data: UTF-8; text j of the block is data[starts[j]:ends[j]]. rows: the texts of the block that the sequence has;
    None: all.
    """

    def __init__(
        self, data: bytes | bytearray | memoryview, starts: Ints, ends: Ints, rows: Rows | None = None
    ) -> None:
        self.data, self.starts, self.ends, self.rows = memoryview(data), starts, ends, rows

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        data, ends = bytearray(), array("q", [0])
        for text in texts:
            data += text.encode("utf-8", "replace")
            ends.append(len(data))
        offsets = np.array(ends, dtype=np.int64)
        return cls(data, offsets[:-1], offsets[1:])

    def take(self, rows: NDArray[np.bool_]) -> "Texts":
        """Returns the texts whose row is true; they share the block of memory."""
        chosen = row_numbers(rows)
        return Texts(self.data, self.starts, self.ends, chosen if self.rows is None else self.rows[chosen])

    def __len__(self) -> int:
        return len(self.starts if self.rows is None else self.rows)

    def __getitem__(self, i: int) -> str:
        j = i if self.rows is None else self.rows[i]
        return str(self.data[self.starts[j] : self.ends[j]], "utf-8")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def lengths(self) -> Ints:
        """Returns the number of bytes of each text: [n]."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *(ends - starts for starts, ends in self._chunks())])

    def digest(self) -> bytes:
        """Returns a hash of the texts in their order, independent of their location in memory."""
        digest = hashlib.blake2b(digest_size=16)
        for starts, ends in self._chunks():
            digest.update((ends - starts).astype("<i8").tobytes())
        for starts, ends in self._chunks():
            gaps = np.flatnonzero(starts[1:] != ends[:-1]) + 1  # texts between two gaps are contiguous
            for first, stop in zip([0, *gaps.tolist()], [*gaps.tolist(), len(starts)], strict=True):
                digest.update(self.data[starts[first] : ends[stop - 1]])
        return digest.digest()

    def _chunks(self) -> Iterator[tuple[Ints, Ints]]:
        """Yield where texts start and end in the block, CHUNK texts at a time."""
        for start in range(0, len(self), CHUNK):
            chosen = slice(start, start + CHUNK)
            rows = chosen if self.rows is None else self.rows[chosen]
            yield self.starts[rows], self.ends[rows]


class Pairs(ABC):
    """Data set of n pairs of an image and a caption. A user's data set is a subclass that implements `load`.

    ids: readable names, the same in every run. captions: stripped, white space collapsed; a pair with an empty one is a
    bad sample. image_of: [n], the number of the image of each pair; pairs with equal numbers are never in one batch.
    records: counts of the records that were read and skipped, for data sets that are files.
    """

    records: Records | None = None

    def __init__(self, ids: Texts, captions: Texts, image_of: Ints) -> None:
        self.ids, self.captions, self.image_of = ids, captions, image_of

    def __len__(self) -> int:
        return len(self.captions)

    @staticmethod
    def from_dataset(dataset: MapDataset, *, image: Field, caption: Field) -> "Pairs":
        """Make pairs of any map-style data set: one of torch, one of Hugging Face, or a list.

            pairs = Pairs.from_dataset(load_dataset("..."), image="image", caption="text")
            pairs = Pairs.from_dataset(CocoCaptions(...), image=0, caption=1)
            pairs = Pairs.from_dataset(dataset, image="jpg", caption=lambda sample: sample["json"]["caption"])

        image, caption: the field of a sample: a key, an index of a tuple, or a function of the sample. A caption is a
        string or a list of strings, an image is a path, the bytes of a file, a Pillow image, an array uint8 [h, w, 3]
        or a tensor uint8 [3, h, w]. All captions of an image should be in one sample, as a list, because a batch must
        not hold two pairs of one image; samples with equal paths are one image.

        All captions are read here, by one dataset[i] for each i; of a Hugging Face data set, if `caption` is a column,
        only the columns of text are read. Images are read later, by dataset[i] from several threads. The pairs of
        sample i are named i#0, i#1 ...; the fingerprint is a hash of these names and of the captions in their order.
        Empty captions, and samples that raise OSError, are counted in `records`.
        Raises ValueError, naming the sample, for a missing field, a caption that is not text, or an image of another
        type; also for a data set without a length or without captions.
        """
        return DatasetPairs(dataset, image, caption)

    @cached_property
    def groups(self) -> Groups:
        """The pairs of each image, of which a batch holds one."""
        return Groups(self.image_of)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of ids and captions in their order; images are not read."""
        return hashlib.blake2b(self.ids.digest() + self.captions.digest(), digest_size=16).hexdigest()

    @abstractmethod
    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        """Read the image of pair i: uint8 [3, size, size]. Must be safe to call from many threads.

        Raises BadImage or OSError if it cannot be read.
        """

    def for_epoch(self, seed: int, epoch: int) -> "Pairs":
        """Returns the pairs as training reads them in an epoch of a run with that seed: with the same ids and captions.

        These pairs themselves, except where a data set has several pictures of an image. Validation does not call it.
        """
        return self

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        """Read the image of pair i for a page: uint8 [3, h, w], the longer side at most `side` pixels.

        By default it is the center of the image at that size; the data sets of this library return the whole image, and
        do not enlarge it. Raises as `load` does.
        """
        return self.load(i, size=side, crop="center")


class ImageFiles(Pairs):
    """Pairs whose images are files: image j is root / images[j]."""

    def __init__(self, root: Path, images: Texts, ids: Texts, captions: Texts, image_of: Ints) -> None:
        super().__init__(ids, captions, image_of)
        self.root, self.images = root, images

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return load_image(self.content(i), size=size, crop=crop)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return thumbnail(self.content(i), side=side)

    def content(self, i: int) -> bytes:
        """Returns the bytes of the image file of pair i. Raises OSError."""
        return read_regular_file(image_path(self.root, self.images[self.image_of[i]]), MAX_BYTES)


class DatasetPairs(Pairs):
    """Pairs of a map-style data set: image j is that of dataset[samples[j]]. See `Pairs.from_dataset`."""

    def __init__(self, dataset: MapDataset, image: Field, caption: Field) -> None:
        check_map_style(dataset)
        self.dataset, self.image = dataset, image
        self.records = records = Records()
        of_path: dict[str, int] = {}  # path of an image -> its number
        samples, captions_of = array("q"), array("q")  # of each image: its first sample, its captions so far
        image_of, number_of = array("q"), array("q")  # of each pair: its image, and its number among those of the image

        def walk() -> Iterator[str]:
            for number, path, texts in read_captions(dataset, image, caption, records):
                j = len(samples) if path is None else of_path.setdefault(path, len(samples))
                if j == len(samples):
                    samples.append(number)
                    captions_of.append(0)
                for text in texts:
                    image_of.append(j)
                    number_of.append(captions_of[j])
                    captions_of[j] += 1
                    yield text

        captions = Texts.of(walk())
        records.log("from_dataset")
        if not len(captions):
            raise ValueError(
                f"from_dataset: a data set must have a caption, got none in {len(dataset)} samples; set caption to the "
                "key of the text of a sample"
            )
        ids = Texts.of(f"{samples[j]}#{k}" for j, k in zip(image_of, number_of, strict=True))
        super().__init__(ids, captions, np.array(image_of, dtype=np.int64))
        self.samples = np.array(samples, dtype=np.int64)  # [number of images]
        with contextlib.suppress(BadImage, OSError):  # the loader counts and replaces those; an image of another kind
            self.load(0, size=1, crop="squash")  # raises ValueError here, not during the run

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return self._read(i, partial(read_image, size=size, crop=crop))

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return self._read(i, partial(read_thumbnail, side=side))

    def _read(self, i: int, read: Callable[..., Tensor]) -> Tensor:
        return read_sample(self.dataset, self.image, int(self.samples[self.image_of[i]]), read)


def pair_counts(training: Pairs, validation: Pairs) -> dict[str, Any]:
    """Returns the numbers of pairs of a run, and of the records read and skipped, for its manifest."""
    sides = {"training": training, "validation": validation}
    records = {f"{side}_records": pairs.records.facts() for side, pairs in sides.items() if pairs.records is not None}
    return {f"{side}_pairs": len(pairs) for side, pairs in sides.items()} | records


class Row(NamedTuple):
    """Record of a file."""

    image: str  # path relative to the root
    captions: object  # unchecked value
    where: str  # file and position, for messages
    split: str | None = None  # if the record names one


def image_files(
    root: Path, rows: Iterable[Row], records: Records | None = None, belongs: Callable[[Row], bool] | None = None
) -> ImageFiles:
    """Returns pairs of image files and captions; the third pair of a.jpg has the id a.jpg#2. See `read_rows`."""
    return read_rows(root, rows, records, belongs)[0]


def read_rows(
    root: Path, rows: Iterable[Row], records: Records | None = None, belongs: Callable[[Row], bool] | None = None
) -> tuple[ImageFiles, Ints]:
    """Returns pairs of image files and captions, and for each pair the number of its row.

    Every caption of every row is counted in `records`, which becomes that of the pairs: read, skipped, or left out
    because `belongs` returns false for its row. Raises ValueError, naming the record, if captions are neither a string
    nor a list of strings.
    """
    images: dict[str, int] = {}
    captions_of = array("q")  # number of captions of each image so far
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
    """Returns the path of a name in NFC: the file itself may be named in NFD, as macOS writes names."""
    file = root / name
    decomposed = root / unicodedata.normalize("NFD", name)
    return decomposed if decomposed != file and not os.path.lexists(file) and os.path.lexists(decomposed) else file


def split_name(who: str, split: str) -> str:
    """Returns train, validation or test for any of the names of SPLITS. Raises ValueError for others."""
    if split not in SPLITS:
        raise ValueError(f"{who}: split must be train, validation or test, got {split!r}; use one of these")
    return SPLITS[split]


def threshold(who: str, validation_fraction: float) -> int:
    """Returns the limit below which a name's hash is in the validation split, so that adding images moves none.

    Raises ValueError if validation_fraction is not between 0 and 1.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"{who}: validation_fraction must lie between 0 and 1, got {validation_fraction=}")
    return int(validation_fraction * 2**64)
