"""Pairs of any map-style data set, such as one of torch or of Hugging Face."""

import contextlib
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from torch import Tensor

from grr.data.image_inputs import read_image, read_thumbnail
from grr.data.images import THUMBNAIL, BadImage, Crop
from grr.data.pairs import Ints, Pairs, Texts
from grr.data.records import Records, record_captions

Field: TypeAlias = str | int | Callable[[Any], Any]
"""Where a sample has a value: a key or column, an index of a tuple, or a function of the sample."""


class MapDataset(Protocol):
    """A data set whose samples are found by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetPairs(Pairs):
    """Pairs of the samples of a data set; image j is that of dataset[samples[j]]."""

    def __init__(
        self, dataset: MapDataset, image: Field, samples: Ints, ids: Texts, captions: Texts, image_of: Ints
    ) -> None:
        super().__init__(ids, captions, image_of)
        self.dataset, self.image, self.samples = dataset, image, samples

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        value, where = self._image(i)
        return read_image(value, size=size, crop=crop, where=where)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        value, where = self._image(i)
        return read_thumbnail(value, side=side, where=where)

    def _image(self, i: int) -> tuple[Any, str]:
        """The image of pair i as the data set has it, and its name in messages."""
        number = int(self.samples[self.image_of[i]])
        where = f"from_dataset: the image of dataset[{number}]"
        return _value(self.dataset[number], "image", self.image, number), where


def dataset_pairs(dataset: MapDataset, *, image: Field, caption: Field) -> DatasetPairs:
    """Read the captions of a data set; see `Pairs.from_dataset`."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"from_dataset: the data set must be map-style, with len(dataset) and dataset[i], got "
            f"{type(dataset).__name__}; list(dataset) makes a list of one that fits into memory"
        )
    images: dict[object, int] = {}  # a path, or the number of a sample -> the number of its image
    samples, image_of, captions_of = array("q"), array("q"), array("q")
    records = Records()
    ids: list[str] = []

    def walk() -> Iterator[str]:
        for number, sample in _samples(dataset, image, caption, records):
            value = _value(sample, "caption", caption, number)
            texts = record_captions(
                list(value) if isinstance(value, tuple) else value, f"from_dataset: dataset[{number}]"
            )
            which = images.setdefault(_path(sample, image) or number, len(images)) if any(texts) else -1
            if which == len(samples):
                samples.append(number)
                captions_of.append(0)
            for text in texts:
                if not text:
                    records.skip(f"dataset[{number}]", "empty caption")
                    continue
                image_of.append(which)
                ids.append(f"{samples[which]}#{captions_of[which]}")
                captions_of[which] += 1
                records.read += 1
                yield text

    captions = Texts.of(walk())
    records.log("from_dataset")
    if not len(captions):
        raise ValueError(
            f"from_dataset: a data set must have a caption, got none in {len(dataset)} samples; set caption to the key "
            "of the text of a sample"
        )
    pairs = DatasetPairs(dataset, image, _ints(samples), Texts.of(ids), captions, _ints(image_of))
    pairs.records = records
    with contextlib.suppress(BadImage, OSError):  # which the loader counts, and replaces the sample
        pairs.load(0, size=1, crop="squash")
    return pairs


def _samples(dataset: Any, image: Field, caption: Field, records: Records) -> Iterator[tuple[int, Any]]:
    """The samples of a data set with their numbers; of a Hugging Face data set only the columns that are read."""
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list) and isinstance(caption, str) and hasattr(dataset, "select_columns"):
        for which, column in (("image", image), ("caption", caption)):
            if isinstance(column, str) and column not in names:
                raise ValueError(_no_field(which, column, "the data set", names))
        is_path = isinstance(image, str) and getattr(dataset.features[image], "dtype", "") == "string"
        dataset = dataset.select_columns(list(dict.fromkeys([caption, *([image] if is_path else [])])))
    for number in range(len(dataset)):
        try:
            yield number, dataset[number]
        except (BadImage, OSError) as error:  # of a data set that decodes the image of a sample
            records.skip(f"dataset[{number}]", f"cannot be read: {type(error).__name__}")


def _value(sample: Any, which: str, field: Field, number: int) -> Any:
    """The value of a field of a sample."""
    if callable(field):
        return field(sample)
    try:
        return sample[field]
    except (KeyError, IndexError, TypeError):
        known = list(sample) if isinstance(sample, Mapping) else type(sample).__name__
        raise ValueError(_no_field(which, field, f"dataset[{number}]", known)) from None


def _path(sample: Any, image: Field) -> str | None:
    """The path of a sample's image, by which captions of one image are known; None for other images."""
    try:
        value = image(sample) if callable(image) else sample[image]
    except (KeyError, IndexError, TypeError):
        return None
    return os.fspath(value) if isinstance(value, str | os.PathLike) else None


def _no_field(which: str, field: Field, where: str, known: object) -> str:
    return (
        f"from_dataset: {where} has no {which} {field!r}, it has {known}; set {which} to a key, an index of a tuple or "
        "a function of a sample"
    )


def _ints(numbers: "array[int]") -> Ints:
    return np.array(numbers, dtype=np.int64)
