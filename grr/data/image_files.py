"""Image files of one's own: finding them, and reading them in batches, whatever they turn out to be."""

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
    """What was read of some items."""

    good: list[T]  # [b]
    pixels: Tensor | None  # uint8 [b, 3, h, w]; None if b is 0
    bad: dict[T, str]  # items that cannot be read, and why


def find_images(images: str | Path) -> list[str]:
    """The image files that a path names, in the order of their names: a file, a folder with all that is below it, or a
    glob such as "photos/**/*.jpg".

    Of a folder those that are named as images are. What cannot be looked into, or is named so and is a folder, is among
    them: reading it will say so. Links to folders are followed, each folder once.
    Raises FileNotFoundError if there is none.
    """
    path = str(images)
    if os.path.isdir(path):
        found = sorted(_below(path))
    elif os.path.lexists(path):
        found = [path]
    else:
        found = sorted(name for name in glob(path, recursive=True) if not os.path.isdir(name) or _is_named_so(name))
    if not found:
        raise FileNotFoundError(
            f"find_images: there is no image in {path!r}; give a file, a folder that holds {', '.join(SUFFIXES[:4])} "
            "... at any depth, or a glob in quotes such as 'photos/**/*.jpg'"
        )
    return found


def read_images(files: Iterable[str], *, image_size: int, crop: Crop, batch_size: int) -> Iterator[Batch[str]]:
    """Read image files as a model wants them, in batches, ahead of whoever takes them. No file stops it."""
    return read_batches(lambda file: load_image(file, size=image_size, crop=crop), batches(list(files), batch_size))


def thumbnails(files: Iterable[str], *, side: int = THUMBNAIL) -> Iterator[tuple[str, Tensor | str]]:
    """Read image files to be shown, whole and small: uint8 [3, h, w], or why a file cannot be read."""

    def read(file: str) -> Tensor | str:
        return _tried(partial(thumbnail, side=side), file)

    with ThreadPoolExecutor() as pool:
        for some in batches(list(files), 64):
            yield from zip(some, pool.map(in_thread(read), some), strict=True)


def read_batches(read: Callable[[T], Tensor], of: Iterable[list[T]]) -> Iterator[Batch[T]]:
    """Read the items of each batch, while threads read those of the next; what `read` raises for a bad one is kept."""
    waiting: deque[tuple[list[T], Iterator[Tensor | str]]] = deque()
    with ThreadPoolExecutor() as pool:
        for items in of:
            waiting.append((items, pool.map(in_thread(lambda item: _tried(read, item)), items)))
            if len(waiting) > 1:
                yield _batch(*waiting.popleft())
        for items, content in waiting:
            yield _batch(items, content)


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    """The items, `size` at a time."""
    return (items[i : i + size] for i in range(0, len(items), size))


def _batch(items: list[T], content: Iterator[Tensor | str]) -> Batch[T]:
    read = dict(zip(items, content, strict=True))
    good = {item: x for item, x in read.items() if isinstance(x, Tensor)}
    bad = {item: x for item, x in read.items() if isinstance(x, str)}
    return Batch(list(good), torch.stack(list(good.values())) if good else None, bad)


def _tried(read: Callable[[T], Tensor], item: T) -> Tensor | str:
    try:
        return read(item)
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__  # the name of the file is known already
    except (BadImage, MemoryError, RecursionError) as error:
        return str(error) or type(error).__name__


def _below(folder: str) -> Iterator[str]:
    unreadable: list[str] = []
    seen = {os.path.realpath(folder)}
    walk = os.walk(folder, followlinks=True, onerror=lambda error: unreadable.append(str(error.filename)))
    for place, folders, files in walk:
        yield from (os.path.join(place, name) for name in (*folders, *files) if _is_named_so(name))
        inside = {os.path.realpath(os.path.join(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for real, name in inside.items() if real not in seen)
        seen |= inside.keys()
    yield from unreadable


def _is_named_so(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
