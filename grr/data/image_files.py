"""Image files given by a path: finding them, and reading them in batches with a reason for each bad file."""

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import glob
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from grr.data.images import SUFFIXES, THUMBNAIL, BadImage, Crop, load_image, thumbnail
from grr.data.threads import in_thread

T = TypeVar("T", bound=Hashable)


class Batch(NamedTuple, Generic[T]):
    """Images that were read of some items, and the items that could not be read."""

    good: list[T]  # [b]
    pixels: Tensor | None  # uint8 [b, 3, h, w]; None if b is 0
    bad: dict[T, str]  # item -> reason


def find_images(images: str | Path) -> list[str]:
    """Returns the image files of a path, sorted: a file, a folder with its subfolders, or a glob such as
    "photos/**/*.jpg".

    In a folder, an image is a name with one of SUFFIXES. A folder with such a name and a subfolder that cannot be read
    are included, so that they are reported as bad images. Links to folders are followed, each folder once.
    Raises FileNotFoundError if there is no image.
    """
    path = str(images)
    if os.path.isdir(path):
        found = sorted(_images_in(path))
    elif os.path.lexists(path):
        found = [path]
    else:
        found = sorted(name for name in glob(path, recursive=True) if not os.path.isdir(name) or _has_suffix(name))
    if not found:
        raise FileNotFoundError(
            f"find_images: there is no image in {path!r}; pass a file, a folder that holds {', '.join(SUFFIXES[:4])} "
            "... at any depth, or a glob in quotes such as 'photos/**/*.jpg'"
        )
    return found


def read_images(files: Iterable[str], *, image_size: int, crop: Crop, batch_size: int) -> Iterator[Batch[str]]:
    """Read image files in batches, one batch ahead; files that cannot be read are reported in their batch."""
    return read_batches(lambda file: load_image(file, size=image_size, crop=crop), batches(list(files), batch_size))


def thumbnails(files: Iterable[str], *, side: int = THUMBNAIL) -> Iterator[tuple[str, Tensor | str]]:
    """Read image files as thumbnails: uint8 [3, h, w], or the reason why a file cannot be read."""

    def read(file: str) -> Tensor | str:
        return _read_or_reason(partial(thumbnail, side=side), file)

    with ThreadPoolExecutor() as pool:
        for names in batches(list(files), 64):
            yield from zip(names, pool.map(in_thread(read), names), strict=True)


def read_batches(read: Callable[[T], Tensor], of: Iterable[list[T]]) -> Iterator[Batch[T]]:
    """Read the items of each batch in threads, one batch ahead; errors of `read` are reported in the batch."""
    waiting: deque[tuple[list[T], Iterator[Tensor | str]]] = deque()
    with ThreadPoolExecutor() as pool:
        for items in of:
            waiting.append((items, pool.map(in_thread(lambda item: _read_or_reason(read, item)), items)))
            if len(waiting) > 1:
                yield _batch(*waiting.popleft())
        for items, content in waiting:
            yield _batch(items, content)


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last may be shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))


def _batch(items: list[T], content: Iterator[Tensor | str]) -> Batch[T]:
    results = dict(zip(items, content, strict=True))
    good = {item: x for item, x in results.items() if isinstance(x, Tensor)}
    bad = {item: x for item, x in results.items() if isinstance(x, str)}
    return Batch(list(good), torch.stack(list(good.values())) if good else None, bad)


def _read_or_reason(read: Callable[[T], Tensor], item: T) -> Tensor | str:
    try:
        return read(item)
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__  # without the file's name, which the caller has
    except (BadImage, MemoryError, RecursionError) as error:
        return str(error) or type(error).__name__


def _images_in(folder: str) -> Iterator[str]:
    unreadable: list[str] = []
    visited = {os.path.realpath(folder)}
    walk = os.walk(folder, followlinks=True, onerror=lambda error: unreadable.append(str(error.filename)))
    for current, folders, files in walk:
        yield from (os.path.join(current, name) for name in (*folders, *files) if _has_suffix(name))
        subfolders = {os.path.realpath(os.path.join(current, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for real, name in subfolders.items() if real not in visited)
        visited |= subfolders.keys()
    yield from unreadable


def _has_suffix(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
