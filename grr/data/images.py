"""Images as uint8 tensors: decoding, resizing and cropping of files; normalisation, which the model applies.

Only regular files of at most 512 MiB and 179 million pixels are decoded, in formats that Pillow decodes in this
process: no file starts a program, blocks the reader or fills the memory.
"""

import errno
import io
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from grr.data.rgb import BadImage as BadImage
from grr.data.rgb import to_rgb
from grr.files.regular import read_regular_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; Deng et al. 2009, the values that torchvision made common
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 178_956_970  # above which Pillow warns of a decompression bomb
MAX_BYTES = 2**29  # of a file
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"),
    *(".heic", ".heif"),  # Pillow cannot read these: they are reported as bad images, not ignored
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # independent of a file's suffix
DRAFT = 2  # a JPEG is decoded at a reduced scale, of at least this many times the requested size
MAX_SCANS = 500  # of a JPEG; a progressive one has about ten, and each is decoded over the whole image
TABLES = {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}  # segments of a JPEG before its first scan, beside the frame
MAX_CLIP_PIXELS = 2**24  # of an image that is resized before its center is cropped
THUMBNAIL = 224  # pixels of the longer side of an image that a page shows

Crop = Literal["squash", "center", "clip", "clip_bilinear", "squash_bicubic"]
T = TypeVar("T")


def load_image(source: str | Path | bytes | BinaryIO, *, size: int = 288, crop: Crop = "squash") -> Tensor:
    """Decode and resize an image: uint8 RGB [3, size, size].

    EXIF orientation is applied, transparency is laid on white, an animation is its first frame, and 16 bits are scaled
    to 8. A large JPEG is decoded at a reduced scale, at least twice the requested size, which changes pixels by two
    levels of 255 on average. Decoding takes at most 16 bytes of memory per pixel beside the file, and 20 for WebP and
    JPEG 2000 with transparency. Raises BadImage, with the reason, if the file cannot be decoded; OSError if it does not
    exist; ValueError for another size or crop.
    """
    check_size("load_image", size=size)
    check_crop("load_image", crop)
    return _decode(source, size, lambda image: to_tensor(image, size=size, crop=crop))


def thumbnail(source: str | Path | bytes | BinaryIO, *, side: int = THUMBNAIL) -> Tensor:
    """Decode an image as `load_image` does, in its aspect ratio, never enlarged: uint8 RGB [3, h, w], h, w <= side.

    Raises as `load_image` does.
    """
    check_size("thumbnail", side=side)
    return _decode(source, side, lambda image: to_thumbnail(image, side=side))


def shrink_file(source: str | Path | bytes | BinaryIO, *, size: int, quality: int, squash: bool = False) -> bytes:
    """Decode an image as `load_image` does and encode it as a JPEG file: RGB, its shorter side `size` pixels.

    squash: both sides are. An image whose shorter side is smaller keeps its size, unless it is squashed. quality: of
    the JPEG, 1 to 95. Raises as `load_image` does.
    """
    check_size("shrink_file", size=size)

    def convert(image: Image.Image) -> bytes:
        _check_not_empty(image)
        rgb = to_rgb(_apply_orientation(image))
        shorter = min(rgb.size)
        width, height = (size, size) if squash else (max(1, round(side * size / shorter)) for side in rgb.size)
        if squash or shorter > size:
            rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        rgb.save(file, "JPEG", quality=quality)
        return file.getvalue()

    return _decode(source, size, convert)


def cut_file(source: str | Path | bytes | BinaryIO, box: tuple[int, int, int, int]) -> bytes:
    """Decode an image as `load_image` does and encode a part of it as a PNG file; box: its left, top, right and bottom.

    What goes beyond the image is left out. Raises as `load_image` does, and BadImage if nothing is left.
    """

    def convert(image: Image.Image) -> bytes:
        rgb = to_rgb(_apply_orientation(image))
        left, top, right, bottom = max(0, box[0]), max(0, box[1]), min(rgb.width, box[2]), min(rgb.height, box[3])
        if left >= right or top >= bottom:
            raise BadImage(f"the box {box} shows nothing of {rgb.width} x {rgb.height} pixels")
        file = io.BytesIO()
        rgb.crop((left, top, right, bottom)).save(file, "PNG")
        return file.getvalue()

    return _decode(source, MAX_PIXELS, convert)  # at full scale


def _decode(source: str | Path | bytes | BinaryIO, size: int, convert: Callable[[Image.Image], T]) -> T:
    if isinstance(source, str | Path):
        source = _read(source)
    if source == b"":
        raise BadImage("not a readable image: the file is empty")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of unusual metadata; bombs are refused below
        try:
            with Image.open(file, formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(f"{image.width} x {image.height} pixels are a decompression bomb")
                if isinstance(source, bytes) and image.format in ("JPEG", "MPO") and _scans(source) > MAX_SCANS:
                    raise BadImage(f"a JPEG of {_scans(source):,} scans; at most {MAX_SCANS} are decoded")
                if image.format == "JPEG":
                    image.draft(None, (DRAFT * size, DRAFT * size))
                image.load()
                return convert(image)
        except BadImage:
            raise
        except (MemoryError, RecursionError):
            raise
        except UnidentifiedImageError:
            raise BadImage(f"not a readable image: its content is none of {', '.join(_formats())}") from None
        except Exception as error:  # Pillow's plugins raise errors of many types for damaged files
            raise BadImage(f"not a readable image: {type(error).__name__}: {error}") from error


def _read(path: str | Path) -> bytes:
    try:
        return read_regular_file(path, MAX_BYTES)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EFBIG):  # not a regular file, too large
            raise
        raise BadImage(f"not a readable image: {error.strerror}") from None
    except ValueError as error:  # a name with a null byte
        raise BadImage(f"not a readable image: {error}") from None


@cache
def _formats() -> tuple[str, ...]:
    """Returns the FORMATS that this build of Pillow reads, some of which have no AVIF."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_tensor(image: Image.Image, *, size: int = 288, crop: Crop = "squash") -> Tensor:
    """Convert a Pillow image of any mode to RGB of the requested size: uint8 [3, size, size].

    Images are resized bilinearly with antialiasing. "squash" fits both sides, as in the paper; "center" keeps the
    aspect ratio and crops the longer side; "clip" is the bicubic preprocessing of CLIP, equal to it in every pixel.
    "clip_bilinear" and "squash_bicubic" are "clip" and "squash" with the other filter, as some models of open_clip are
    trained. Raises BadImage if the image has no pixels, or if "clip" would resize it to more than MAX_CLIP_PIXELS;
    ValueError for another size or crop.
    """
    check_size("to_tensor", size=size)
    check_crop("to_tensor", crop)
    _check_not_empty(image)
    rgb = to_rgb(_apply_orientation(image))
    bicubic = crop in ("clip", "squash_bicubic")
    resampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    if crop == "center":
        rgb = ImageOps.fit(rgb, (size, size), resampling)
    elif crop in ("clip", "clip_bilinear"):
        width, height = (int(size * side / min(rgb.size)) for side in rgb.size)
        if width * height > MAX_CLIP_PIXELS:
            raise BadImage(
                f"{image.width} x {image.height} pixels are too narrow: a side of {size} would take {width} x {height}"
            )
        left, top = round((width - size) / 2), round((height - size) / 2)
        rgb = rgb.resize((width, height), resampling).crop((left, top, left + size, top + size))
    else:
        rgb = rgb.resize((size, size), resampling)
    return _planes(rgb)


def to_thumbnail(image: Image.Image, *, side: int = THUMBNAIL) -> Tensor:
    """A Pillow image of any mode, in RGB and its own shape, at most `side` pixels a side: uint8 [3, h, w].

    A smaller image keeps its size. Raises BadImage if the image has no pixels, ValueError for another side.
    """
    check_size("to_thumbnail", side=side)
    _check_not_empty(image)
    rgb = to_rgb(_apply_orientation(image))
    rgb.thumbnail((side, side))
    return _planes(rgb)


def normalize(images: Tensor, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Normalise images: uint8 [b, 3, h, w] -> float32 (x / 255 - mean) / std, by default as ImageNet.

    Float images are returned unchanged, because they are normalised already.
    """
    if images.dtype != torch.uint8:
        return images
    m, s = (_channels(numbers, images.device) for numbers in (mean, std))
    return (images.float() / 255 - m) / s


def _channels(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Returns [c, 1, 1]; filled on the device, because a copy from the host would wait for it."""
    return torch.cat([torch.full((1, 1, 1), number, device=device) for number in numbers])


def check_size(who: str, **size: int) -> None:
    """Raise ValueError, not BadImage, if a size is not a positive int: the caller is wrong, and not the image."""
    for name, value in size.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{who}: {name} must be a positive int, got {name}={value!r}; give a number of pixels")


def check_crop(who: str, crop: str) -> None:
    """Raise ValueError, not BadImage, if a crop is not known."""
    if crop not in get_args(Crop):
        raise ValueError(f"{who}: crop must be one of {', '.join(get_args(Crop))}, got {crop=}; choose one of these")


def _check_not_empty(image: Image.Image) -> None:
    if not image.width or not image.height:
        raise BadImage(f"not a readable image: it has {image.width} x {image.height} pixels")


def _planes(rgb: Image.Image) -> Tensor:
    """Returns the pixels of an RGB image: uint8 [3, h, w]."""
    rows = np.frombuffer(rgb.tobytes("raw", "RGB;L"), dtype=np.uint8)  # the three planes of each row
    return torch.from_numpy(rows.reshape(rgb.height, 3, rgb.width).transpose(1, 0, 2).copy())


def _scans(jpeg: bytes) -> int:
    """Returns the number of scans of a JPEG, or more: of a frame that one scan completes, decoders read no other."""
    if _is_one_scan(jpeg):
        return 1
    return jpeg.count(b"\xff\xda")  # in compressed data, 00 follows every ff


def _is_one_scan(jpeg: bytes) -> bool:
    """Returns whether the frame of a JPEG is sequential and its first scan has all components; False if in doubt."""
    place, components = 2, 0  # after SOI
    while place + 10 < len(jpeg) and jpeg[place] == 0xFF:
        marker, length = jpeg[place + 1], int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if marker == 0xDA:  # SOS
            return 0 < components == jpeg[place + 4]
        if marker in (0xC0, 0xC1):  # SOF of a sequential frame with Huffman codes
            components = jpeg[place + 9]
        elif marker not in TABLES or length < 2:
            return False
        place += 2 + length
    return False


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Rotate and mirror an image as its EXIF orientation requires; without one, return the image, not a copy."""
    is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return ImageOps.exif_transpose(image) if is_rotated else image
