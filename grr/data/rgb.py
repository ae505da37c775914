"""Conversion of Pillow images of any mode to 8-bit RGB."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STRIP = 2**16  # pixels that are converted at a time


class BadImage(ValueError):
    """Error of a file that cannot be decoded as an image, or only in part."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparency on white, grey levels of more than 8 bits scaled to 8.

    The image is converted strip by strip, so that intermediate copies take little memory. Raises BadImage if no pixel
    is a finite number.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    convert = _scale_grey(image) if image.mode in ("I", "F") or image.mode.startswith("I;16") else _strip_to_rgb
    rgb = Image.new("RGB", image.size)
    for strip, top in _strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Yield strips of whole rows, each with its first row."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height))), top


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    return image.convert("RGB")


def _scale_grey(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Returns a function that scales strips of a grey image to 8 bits.

    Integers in [0, 65535] are scaled from that range (mode "I" below 256: from [0, 255]), other integers from their own
    range. Floats are scaled from [0, 1] if they are inside, otherwise from their own range widened to [0, 255]. NaN and
    minus infinity become black, infinity white. Raises BadImage if no pixel is a finite number.
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


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, to_rgb)
    assert converted is not None
    return converted
