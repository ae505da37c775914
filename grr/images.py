"""Images as tensors: what a person sees in a file, as bytes; normalised on the device, by the model."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; Deng et al. 2009, the values that torchvision made common
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 178_956_970  # where Pillow begins to warn of a decompression bomb
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif",
            ".heic", ".heif")  # of files that people call images; Pillow cannot read the last two  # fmt: skip
DRAFT = 2  # a JPEG is decoded at no less than so many times the wanted size

Crop = Literal["squash", "center", "clip"]


class BadImage(ValueError):
    """A file that is not, or not wholly, an image."""


def load_image(source: str | Path | bytes | BinaryIO, *, size: int = 288, crop: Crop = "squash") -> Tensor:
    """Decode an image as a person would see it: uint8 RGB [3, size, size].

    Turned as EXIF says, transparency laid on white, the first frame of an animation, 16 bits scaled to 8. A large JPEG
    is decoded at a reduced scale, at least twice the size wanted, which changes pixels by two levels of 255 on average.
    Raises BadImage, saying why, for whatever cannot be decoded; OSError if there is no such file.
    """
    return _decoded(source, size, lambda image: to_tensor(image, size=size, crop=crop))


def thumbnail(source: str | Path | bytes | BinaryIO, *, side: int) -> Tensor:
    """Decode an image as `load_image` does, in its own shape, at most `side` pixels a side: uint8 RGB [3, h, w]."""
    return _decoded(source, side, lambda image: _small(image, side))


def _decoded(source: str | Path | bytes | BinaryIO, size: int, use: Callable[[Image.Image], Tensor]) -> Tensor:
    if isinstance(source, str | Path):
        source = Path(source).read_bytes()
    if source == b"":
        raise BadImage("not a readable image: the file is empty")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; bombs are refused below
        try:
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(f"{image.width} x {image.height} pixels are a decompression bomb")
                if image.format == "JPEG":
                    image.draft(None, (DRAFT * size, DRAFT * size))
                image.load()
                return use(image)
        except BadImage:
            raise
        except (MemoryError, RecursionError):
            raise
        except UnidentifiedImageError:
            raise BadImage("not a readable image: its content has no format that is known") from None
        except Exception as error:  # Pillow's plugins raise nearly anything at damaged files
            raise BadImage(f"not a readable image: {type(error).__name__}: {error}") from error


def to_tensor(image: Image.Image, *, size: int = 288, crop: Crop = "squash") -> Tensor:
    """A Pillow image of any mode, in RGB at the wanted size: uint8 [3, size, size].

    Resized bilinearly with antialiasing. "squash" fits both sides, as the paper does; "center" keeps the shape and
    cuts the longer side; "clip" does so to the pixel as CLIP does, bicubically, for weights of that family. Raises
    BadImage if the image has no pixels, or is so narrow that its longer side would be too long for "clip".
    """
    _refuse_empty(image)
    rgb = _rgb(ImageOps.exif_transpose(image))
    if crop == "center":
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    elif crop == "clip":
        width, height = (int(size * side / min(rgb.size)) for side in rgb.size)
        if width * height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels are too narrow: a side of {size} would take "
                           f"{width} x {height}")  # fmt: skip
        left, top = round((width - size) / 2), round((height - size) / 2)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    else:
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
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


def _small(image: Image.Image, side: int) -> Tensor:
    _refuse_empty(image)
    rgb = _rgb(ImageOps.exif_transpose(image))
    rgb.thumbnail((side, side))
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _refuse_empty(image: Image.Image) -> None:
    if not image.width or not image.height:
        raise BadImage(f"{image.width} x {image.height} pixels are no image")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        return _from_lab(image)
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """More than 8 bits of grey: 16-bit integers by their range, floats in [0, 1] by that, all others by their own."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = values.min(), values.max()
    if image.mode == "F":
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (min(low, 0.0), max(high, 255.0))
    elif low >= 0 and high < 2**16:
        low, high = 0, (255 if high < 2**8 and image.mode == "I" else 2**16 - 1)
    scaled = (values - low) / max(high - low, 1e-9) * 255
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, to_rgb)
    assert converted is not None
    return converted
