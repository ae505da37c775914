"""Images of any type as pixels: a file, its bytes, a Pillow image, an array or a tensor."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from grr.data.images import (
    MAX_BYTES,
    BadImage,
    Crop,
    check_crop,
    check_size,
    load_image,
    thumbnail,
    to_tensor,
    to_thumbnail,
)

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any] | Tensor
"""One image: a file (path, bytes or opened), a Pillow image, an array uint8 [h, w, 3] or a tensor uint8 [3, h, w]."""
ImageInputs: TypeAlias = ImageInput | Iterable[ImageInput]
"""One image, several of them, an array uint8 [b, h, w, 3] or a tensor uint8 [b, 3, h, w]."""


def read_image(image: object, *, size: int, crop: Crop, where: str) -> Tensor:
    """Returns one image of any type as uint8 RGB [3, size, size], as `grr.data.images.load_image` returns a file's.

    image: an `ImageInput`, or a dict with "bytes" or "path", which Hugging Face data sets have for an image that they
    did not decode. A large JPEG file is decoded at a reduced scale, and a Pillow image of it is not, so their pixels
    differ by two levels of 255 on average; all other types of one image result in the same pixels.
    where: the name of the image in messages. Raises ValueError for a value of another type, dtype or shape, or another
    size or crop; BadImage if the image cannot be decoded; OSError if the file cannot be read.
    """
    check_size(where, size=size)  # before errors of Pillow become BadImage
    check_crop(where, crop)
    return _read(image, where, partial(load_image, size=size, crop=crop), partial(to_tensor, size=size, crop=crop))


def read_thumbnail(image: object, *, side: int, where: str) -> Tensor:
    """Returns one image in any form whole and never enlarged: uint8 RGB [3, h, w], h and w <= side.

    image, where, errors: those of `read_image`.
    """
    check_size(where, side=side)
    return _read(image, where, partial(thumbnail, side=side), partial(to_thumbnail, side=side))


def each_image(images: ImageInputs) -> Iterator[ImageInput]:
    """Yield the images of an argument: one for a single image, the rows of a batch, the items of an iterable."""
    if isinstance(images, Tensor | np.ndarray):
        return iter(images if images.ndim == 4 else [images])
    one = isinstance(images, str | os.PathLike | bytes | Image.Image | Mapping) or not isinstance(images, Iterable)
    one = one or hasattr(images, "read")  # a file, whose items are lines
    return iter([images] if one else images)  # type: ignore[list-item, arg-type]


def named_error(error: BadImage | OSError, where: str, image: object) -> BadImage | OSError:
    """Returns an error of the same class whose message names the image: `where`, and its path if it has one."""
    if isinstance(image, Mapping) and image.get("bytes") is None:
        image = image.get("path")
    path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
    name = where if path is None else f"{where}, {path!r},"
    if isinstance(error, BadImage):
        remedy = "leave it out, or copy it again"
        if path is not None and "\0" not in path and os.path.isdir(path):
            remedy = "give the paths of the image files in it"
        return BadImage(f"{name} must be an image, got {error}; {remedy}")
    why = error.strerror or str(error) or type(error).__name__
    message = f"{name} cannot be read: {why}; give the path of an image file on this machine"
    try:
        return type(error)(message)
    except TypeError:  # a class of another library, with arguments of its own
        return OSError(message)


def _read(
    image: object, where: str, of_file: Callable[[str | bytes], Tensor], of_image: Callable[[Image.Image], Tensor]
) -> Tensor:
    if isinstance(image, Mapping):
        content, path = image.get("bytes"), image.get("path")
        if content is None and path is None:
            raise ValueError(
                f'{where} must hold "bytes" or "path" if it is a dict, got a dict of {str(list(image))[:60]}; give the '
                "image in it"
            )
        image = content if content is not None else path
    if isinstance(image, bytes):
        return of_file(image)
    if isinstance(image, str | os.PathLike):
        return of_file(os.fspath(image))
    if isinstance(image, Tensor):
        image = Image.fromarray(_checked(image.detach().cpu().numpy(), 0, where).transpose(1, 2, 0))
    elif isinstance(image, np.ndarray):
        image = Image.fromarray(_checked(image, 2, where))
    if not isinstance(image, Image.Image) and hasattr(image, "read"):
        return of_file(_content(image, where))
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"{where} must be a path, a Pillow image, an array uint8 [h, w, 3] or a tensor uint8 [3, h, w], got "
            f"{_named(image)}; give the path of an image file"
        )
    try:
        return of_image(image)
    except (BadImage, OSError, MemoryError, RecursionError):
        raise
    except Exception as error:  # Pillow decodes a file when its pixels are used, and raises errors of many types
        raise BadImage(f"not a readable image: {type(error).__name__}: {error}") from error


def _checked(array: NDArray[Any], channels: int, where: str) -> NDArray[np.uint8]:
    """Returns the array if it is a uint8 image with three channels on the axis `channels`. Raises ValueError."""
    kind = "a tensor uint8 [3, h, w]" if channels == 0 else "an array uint8 [h, w, 3]"
    got = f"{array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        remedy = "scale it to 0 ... 255, round it and cast it to uint8"
        if array.dtype.kind == "f":
            remedy += "; floats that were normalised already go to model.encode_image"
        raise ValueError(f"{where} must be {kind}, got {got}; {remedy}")
    if array.ndim != 3 or array.shape[channels] != 3 or 0 in array.shape:
        remedy = "give an image with the channels red, green and blue"
        if array.ndim == 3 and array.shape[2 - channels] == 3:
            remedy = "permute its axes"
        elif array.ndim == 2 or (array.ndim == 3 and array.shape[channels] == 4):
            remedy = "PIL.Image.fromarray makes an image of an array [h, w] that is grey, or [h, w, 4] with alpha"
        elif array.ndim == 3 and array.shape[channels] == 1:
            remedy = "repeat its channel three times"
        elif array.ndim == 4:
            remedy = "give the batch alone, not in a list"
        raise ValueError(f"{where} must be {kind} with h and w at least 1, got {got}; {remedy}")
    return array


def _content(file: Any, where: str) -> bytes:
    """Returns the bytes of an opened file. Raises ValueError if it is open as text or closed, BadImage if too large."""
    if isinstance(file, io.TextIOBase):
        raise ValueError(f"{where} must be a file opened in binary mode, got one of text; open it with mode 'rb'")
    try:
        content = file.read(MAX_BYTES + 1)
    except ValueError as error:
        raise ValueError(f"{where} must be an open file, got {error}; give its path, or open it again") from error
    if not isinstance(content, bytes):
        raise ValueError(f"{where} must be a file whose read() returns bytes, got {_named(content)}; give its path")
    if len(content) > MAX_BYTES:
        raise BadImage(f"not a readable image: has more than {MAX_BYTES:,} bytes")
    return content


def _named(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
