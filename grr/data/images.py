"""Images as tensors: what a person sees in a file, as bytes; normalised on the device, by the model."""

import errno
import io
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from grr.files.regular import read_regular_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; Deng et al. 2009, the values that torchvision made common
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 178_956_970  # where Pillow begins to warn of a decompression bomb
MAX_BYTES = 2**29  # of a file
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif",
            ".heic", ".heif")  # of files that people call images; Pillow cannot read the last two  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # read whatever a file is named
DRAFT = 2  # a JPEG is decoded at no less than so many times the wanted size
MAX_SCANS = 500  # of a JPEG; a progressive one has about ten, and each passes over the whole image
STRIP = 2**16  # pixels that are converted at a time
THUMBNAIL = 224  # pixels of the longer side of an image that a page shows
MAX_CLIP_PIXELS = 2**24  # of an image that is resized whole before its middle is cut out

Crop = Literal["squash", "center", "clip"]


class BadImage(ValueError):
    """A file that is not, or not wholly, an image."""


def load_image(source: str | Path | bytes | BinaryIO, *, size: int = 288, crop: Crop = "squash") -> Tensor:
    """Decode an image as a person would see it: uint8 RGB [3, size, size].

    Turned as EXIF says, transparency laid on white, the first frame of an animation, 16 bits scaled to 8. A large JPEG
    is decoded at a reduced scale, at least twice the size wanted, which changes pixels by two levels of 255 on average.
    Only FORMATS are read, which Pillow decodes in this process, from this file alone: regular files of at most 512 MiB
    and 179 million pixels. Decoding takes at most 16 bytes of memory a pixel beside the file, and 20 for WebP and
    JPEG 2000 with transparency.
    Raises BadImage, saying why, for whatever cannot be decoded; OSError if there is no such file.
    """
    return _decoded(source, size, lambda image: to_tensor(image, size=size, crop=crop))


def thumbnail(source: str | Path | bytes | BinaryIO, *, side: int = THUMBNAIL) -> Tensor:
    """Decode an image as `load_image` does, whole and never enlarged: uint8 RGB [3, h, w], h and w <= side.

    Raises as `load_image` does.
    """
    return _decoded(source, side, lambda image: to_thumbnail(image, side=side))


def _decoded(source: str | Path | bytes | BinaryIO, size: int, use: Callable[[Image.Image], Tensor]) -> Tensor:
    if isinstance(source, str | Path):
        source = _content(source)
    if source == b"":
        raise BadImage("not a readable image: the file is empty")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; bombs are refused below
        try:
            with Image.open(file, formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(f"{image.width} x {image.height} pixels are a decompression bomb")
                if isinstance(source, bytes) and image.format in ("JPEG", "MPO") and _scans(source) > MAX_SCANS:
                    raise BadImage(f"a JPEG of {_scans(source):,} scans; at most {MAX_SCANS} are decoded")
                if image.format == "JPEG":
                    image.draft(None, (DRAFT * size, DRAFT * size))
                image.load()
                return use(image)
        except BadImage:
            raise
        except (MemoryError, RecursionError):
            raise
        except UnidentifiedImageError:
            raise BadImage(f"not a readable image: its content is none of {', '.join(_formats())}") from None
        except Exception as error:  # Pillow's plugins raise nearly anything at damaged files
            raise BadImage(f"not a readable image: {type(error).__name__}: {error}") from error


def _content(path: str | Path) -> bytes:
    try:
        return read_regular_file(path, MAX_BYTES)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EFBIG):  # not a regular file, too large
            raise
        raise BadImage(f"not a readable image: {error.strerror}") from None
    except ValueError as error:  # of a name with a null byte, which no file has
        raise BadImage(f"not a readable image: {error}") from None


@cache
def _formats() -> tuple[str, ...]:
    """FORMATS without those that this Pillow was built without: AVIF, say."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_tensor(image: Image.Image, *, size: int = 288, crop: Crop = "squash") -> Tensor:
    """A Pillow image of any mode, in RGB at the wanted size: uint8 [3, size, size].

    Resized bilinearly with antialiasing. "squash" fits both sides, as the paper does; "center" keeps the shape and
    cuts the longer side; "clip" does so to the pixel as CLIP does, bicubically, for weights of that family. Raises
    BadImage if the image has no pixels, or is so narrow that its longer side would be too long for "clip".
    """
    _refuse_empty(image)
    rgb = _rgb(_upright(image))
    if crop == "center":
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    elif crop == "clip":
        width, height = (int(size * side / min(rgb.size)) for side in rgb.size)
        if width * height > MAX_CLIP_PIXELS:
            raise BadImage(
                f"{image.width} x {image.height} pixels are too narrow: a side of {size} would take {width} x {height}"
            )
        left, top = round((width - size) / 2), round((height - size) / 2)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    else:
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def to_thumbnail(image: Image.Image, *, side: int = THUMBNAIL) -> Tensor:
    """A Pillow image of any mode, in RGB and its own shape, at most `side` pixels a side: uint8 [3, h, w].

    A smaller image keeps its size. Raises BadImage if the image has no pixels.
    """
    _refuse_empty(image)
    rgb = _rgb(_upright(image))
    rgb.thumbnail((side, side))
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def normalize(images: Tensor) -> Tensor:
    """uint8 [b, 3, h, w] -> float32, scaled to [0, 1], less the mean, by the deviation of ImageNet.

    Floats are returned as they are: they were normalised already.
    """
    if images.dtype != torch.uint8:
        return images
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    deviation = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / deviation


def _refuse_empty(image: Image.Image) -> None:
    if not image.width or not image.height:
        raise BadImage(f"{image.width} x {image.height} pixels are no image")


def _scans(jpeg: bytes) -> int:
    return jpeg.count(b"\xff\xda")  # in compressed data a 00 follows each ff


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; itself, not a copy, if there is nothing to turn."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return ImageOps.exif_transpose(image) if turned else image


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB; converted strip by strip, so that what lies between the two is never whole in memory."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    convert = _grey_of(image) if image.mode in ("I", "F") or image.mode.startswith("I;16") else _rgb_strip
    rgb = Image.new("RGB", image.size)
    for strip, top in _strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Strips of whole rows, and where each begins."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height))), top


def _rgb_strip(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        return _from_lab(image)
    return image.convert("RGB")


def _grey_of(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Returns what scales strips of more than 8 bits of grey: 16-bit integers by their range, floats in [0, 1] by that,
    all others by their own. NaN is black, an infinity black or white.

    Raises BadImage if no pixel is a finite number.
    """
    extremes = [(x.min(), x.max()) for strip, _ in _strips(image) if (x := _finite(strip)).size]
    if not extremes:
        raise BadImage("not a readable image: none of its pixels is a finite number")
    low, high = min(x for x, _ in extremes), max(x for _, x in extremes)
    if image.mode == "F":
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (min(low, 0.0), max(high, 255.0))
    elif low >= 0 and high < 2**16:
        low, high = 0, (255 if high < 2**8 and image.mode == "I" else 2**16 - 1)

    def scale(strip: Image.Image) -> Image.Image:
        values = np.nan_to_num(np.asarray(strip, dtype=np.float64), nan=low, neginf=low, posinf=high)
        scaled = (values - low) / max(high - low, 1e-9) * 255
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))

    return scale


def _finite(strip: Image.Image) -> NDArray[np.float64]:
    values = np.asarray(strip, dtype=np.float64)
    return values[np.isfinite(values)]


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, to_rgb)
    assert converted is not None
    return converted
