"""Map-style data sets of other libraries, such as torch and Hugging Face: captions as text, images as pixels."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from grr.data.image_inputs import named_error
from grr.data.images import BadImage
from grr.data.records import Records, record_captions

Field: TypeAlias = str | int | Callable[[Any], Any]
"""Where a sample has a value: a key or column, an index of a tuple, or a function of the sample."""


class MapDataset(Protocol):
    """Data set whose samples are indexed by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def check_map_style(dataset: object) -> None:
    """Raise ValueError for a data set whose samples cannot be indexed by number."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"from_dataset: the data set must be map-style, with len(dataset) and dataset[i], got "
            f"{type(dataset).__name__}; list(dataset) makes a list of one that fits into memory"
        )


def read_captions(
    dataset: MapDataset, image: Field, caption: Field, records: Records
) -> Iterator[tuple[int, str | None, list[str]]]:
    """Yield the number of each sample that has a caption, the path of its image if it has one, and its captions.

    Every caption is counted in `records`, read or skipped. Raises ValueError as `Pairs.from_dataset` does.
    """
    for number, sample in _samples(dataset, image, caption, records):
        value = _value(sample, "caption", caption, number)
        texts = record_captions(list(value) if isinstance(value, tuple) else value, f"from_dataset: dataset[{number}]")
        if empty := texts.count(""):
            records.skip(f"dataset[{number}]", "empty caption", empty)
        records.read += len(texts) - empty
        if any(texts):
            yield number, _path(sample, image), list(filter(None, texts))


def read_sample(dataset: MapDataset, image: Field, number: int, read: Callable[..., Tensor]) -> Tensor:
    """Returns read(image, where=...) of the image of a sample, where is its name in messages.

    BadImage and OSError, of the data set or of `read`, are raised again with the name of the sample and the image.
    """
    where = f"from_dataset: the image of dataset[{number}]"
    value: Any = None
    try:
        value = _value(dataset[number], "image", image, number)
        return read(value, where=where)
    except (BadImage, OSError) as error:
        named = error.filename if value is None and isinstance(error, OSError) else value
        raise named_error(error, where, named) from error


def _samples(dataset: Any, image: Field, caption: Field, records: Records) -> Iterator[tuple[int, Any]]:
    """Yield the samples of a data set with their numbers; of a Hugging Face data set only the required columns."""
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
        except (BadImage, OSError) as error:  # the data set decodes images itself
            records.skip(f"dataset[{number}]", f"cannot be read: {type(error).__name__}")
        except KeyError as error:
            raise ValueError(
                f"from_dataset: the samples of a data set must be dataset[0] to dataset[{len(dataset) - 1}], got "
                f"KeyError: {error} from dataset[{number}] of a {type(dataset).__name__}; give a list of dicts, which "
                "[dict(zip(d, row)) for row in zip(*d.values())] makes of a dict d of lists, and "
                'df.to_dict("records") of a DataFrame df, or one split of the data set'
            ) from error


def _value(sample: Any, which: str, field: Field, number: int) -> Any:
    """Returns the value of a field of a sample."""
    if callable(field):
        return field(sample)
    try:
        return sample[field]
    except (KeyError, IndexError, TypeError):
        known = list(sample) if isinstance(sample, Mapping) else type(sample).__name__
        raise ValueError(_no_field(which, field, f"dataset[{number}]", known)) from None


def _path(sample: Any, image: Field) -> str | None:
    """Returns the path of a sample's image, which identifies captions of one image; None for images without a path."""
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
