"""Every mode and format is decoded to the same pixels, and damaged bytes raise only BadImage."""

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from grr.data import Pairs
from grr.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BadImage,
    load_image,
    normalize,
    thumbnail,
    to_tensor,
    to_thumbnail,
)

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F",
         "I;16", "I;16L", "I;16B"]  # fmt: skip


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """Returns a smooth picture, with more green at the right and more red at the top."""
    y, x = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
    rgb = np.stack((255 * (1 - y), 255 * x, 128 * x + 64), axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().mean(0)


@pytest.mark.parametrize("mode", MODES)
def test_every_image_mode_is_converted_to_rgb(mode):
    source = photo()
    if mode.startswith("I") or mode == "F":
        values = np.asarray(source.convert("L")).astype(np.float64)
        scale, kind = (1 / 255, np.float32) if mode == "F" else (257, np.int32 if mode == "I" else np.uint16)
        image = Image.fromarray((values * scale).astype(kind))
        if mode.startswith("I;16"):
            content = (values * 257).astype(">u2" if mode.endswith("B") else "<u2").tobytes()
            image = Image.frombytes(mode, image.size, content)
    elif mode in ("La", "RGBa"):
        image = source.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(source, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    elif mode == "PA":
        image = source.convert("P").convert("PA")
    else:
        image = source.convert(mode)
    assert image.mode == mode
    pixels, expected = to_tensor(image, size=32), to_tensor(source, size=32)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 32, 32)
    if mode in ("1", "P", "PA"):  # dithered or of few colours
        assert (grey(pixels).mean() - grey(expected).mean()).abs() < 12
    elif mode in ("L", "LA", "La", "I", "F") or mode.startswith("I;16"):
        expected = to_tensor(source.convert("L"), size=32)
        assert (pixels.int() - expected.int()).abs().max() <= 2
    else:
        assert (pixels.int() - expected.int()).abs().float().mean() < 4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95}),
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("BMP", {}),
    ],
)
def test_every_format_is_read(kind, options):
    pixels = load_image(encoded(photo(), kind, **options), size=32)
    assert (pixels.int() - to_tensor(photo(), size=32).int()).abs().float().mean() < 6


def test_a_path_bytes_and_a_file_are_the_same_image(tmp_path):
    data = encoded(photo(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    images = [load_image(s, size=16) for s in (tmp_path / "a.png", str(tmp_path / "a.png"), data, io.BytesIO(data))]
    assert all(torch.equal(images[0], other) for other in images)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    upright = photo()
    inverse = [
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    ]  # of 2 to 8
    stored = upright.transpose(Image.Transpose[inverse[orientation - 2]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = load_image(encoded(stored, "PNG", exif=exif), size=32)
    torch.testing.assert_close(pixels, to_tensor(upright, size=32), rtol=0, atol=0)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (load_image(encoded(clear, "PNG"), size=8) == 255).all()
    half = to_tensor(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), size=8)
    assert (half.int() - 127).abs().max() <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert (load_image(encoded(palette, "PNG", transparency=0), size=8) == 255).all()


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    pixels = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), size=8)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.sampled_from([8, 16, 33]))
def test_resizing_equals_torchs_bilinear_with_antialiasing(width, height, size):
    image = photo(width, height)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double().unsqueeze(0)
    expected = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]
    assert (to_tensor(image, size=size).double() - expected).abs().max() <= 1.01


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
def test_clip_resizes_and_then_crops_the_center(width, height, size):
    image = photo(width, height)
    pixels, factor = to_tensor(image, size=size, crop="clip"), size / min(width, height)
    wide, high = int(size * width / min(width, height)), int(size * height / min(width, height))
    whole = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
    assert min(wide, high) == size
    assert max(wide, high) == pytest.approx(factor * max(width, height), abs=1)
    left, top = np.floor((wide - size) / 2), np.floor((high - size) / 2)  # the center, or half a pixel beside it
    cuts = [
        whole[int(y) : int(y) + size, int(x) : int(x) + size]
        for y in (top, top + (high - size) % 2)
        for x in (left, left + (wide - size) % 2)
    ]
    assert any(np.array_equal(cut, pixels.permute(1, 2, 0)) for cut in cuts)


def test_an_image_too_narrow_to_be_resized_is_bad():
    with pytest.raises(BadImage, match="1 x 40000 pixels are too narrow: a side of 224 would take 224 x 8960000"):
        to_tensor(Image.new("RGB", (1, 40_000)), size=224, crop="clip")
    with pytest.raises(BadImage, match="a side of 224 would take 224 x 89600"):  # 80 MB for 400 pixels
        to_tensor(Image.new("RGB", (1, 400)), size=224, crop="clip")
    assert to_tensor(Image.new("RGB", (1, 100)), size=224, crop="clip").shape == (3, 224, 224)


def test_center_keeps_the_aspect_ratio_and_crops_the_longer_side():
    wide = photo(100, 50)
    expected = to_tensor(wide.crop((25, 0, 75, 50)), size=32)
    assert (to_tensor(wide, size=32, crop="center").int() - expected.int()).abs().max() <= 2


def test_a_jpeg_decoded_at_a_reduced_scale_differs_by_a_few_levels(shared_data):
    for file in sorted((shared_data / "coco_mini/train2017").glob("*.jpg"))[:12]:
        with Image.open(file) as image:
            whole = to_tensor(ImageOps.exif_transpose(image), size=64)
        difference = (load_image(file, size=64).int() - whole.int()).abs().float()
        assert difference.mean() < 2.5


@given(data=st.binary(max_size=300))
def test_no_bytes_raise_anything_but_bad_image(data):
    with pytest.raises(BadImage, match="not a readable image"):
        load_image(data, size=8)


@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
    cut=st.floats(0, 1),
    noise=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=5),
)
def test_a_damaged_file_is_read_or_refused(kind, cut, noise):
    data = bytearray(encoded(photo(), kind))
    for place, value in noise:
        data[int(place * (len(data) - 1))] = value
    with contextlib.suppress(BadImage):
        assert load_image(bytes(data[: int(cut * len(data))]), size=8).shape == (3, 8, 8)


def test_a_truncated_file_is_refused_and_the_cause_named():
    data = encoded(photo(400, 300), "JPEG")
    with pytest.raises(BadImage, match=r"not a readable image: OSError: .*truncated"):
        load_image(data[: len(data) // 2], size=8)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(BadImage, match="bomb"):
        load_image(bomb, size=8)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize(
    ("name", "value"),
    [("crop", "centre"), ("crop", None), ("size", 0), ("size", -3), ("size", 8.0), ("size", "8"), ("size", True)],
)
def test_a_wrong_size_or_crop_is_an_error_of_the_caller_and_not_of_the_image(tmp_path, name, value):
    image = Image.new("RGB", (9, 9))
    image.save(tmp_path / "a.png")
    pairs = Pairs.from_dataset([{"image": image, "text": "a"}], image="image", caption="text")
    given = {"size": 8, "crop": "squash", name: value}
    for read in (
        lambda: load_image(tmp_path / "a.png", **given),
        lambda: to_tensor(image, **given),
        lambda: pairs.load(0, **given),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {name}={value!r}; ") as error:
            read()
        assert not isinstance(error.value, BadImage)


@pytest.mark.parametrize("side", [0, 8.0])
def test_a_wrong_side_of_a_thumbnail_is_an_error_of_the_caller(tmp_path, side):
    image = Image.new("RGB", (9, 9))
    image.save(tmp_path / "a.png")
    pairs = Pairs.from_dataset([{"image": image, "text": "a"}], image="image", caption="text")
    reads = [lambda: thumbnail(tmp_path / "a.png", side=side), lambda: to_thumbnail(image, side=side)]
    for read in (*reads, lambda: pairs.thumbnail(0, side=side)):
        with pytest.raises(ValueError, match=f"side must be a positive int, got side={side}") as error:
            read()
        assert not isinstance(error.value, BadImage)


def test_normalize_is_the_formula_for_uint8_and_the_identity_for_floats():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = torch.empty(2, 3, 4, 5, dtype=torch.float64)
    for c in range(3):
        expected[:, c] = (images[:, c].double() / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
    torch.testing.assert_close(normalize(images).double(), expected, atol=1e-6, rtol=1e-6)
    assert normalize(expected) is expected


def test_normalize_can_be_exported():
    class Normalize(torch.nn.Module):
        def forward(self, x):
            return normalize(x)

    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    torch.testing.assert_close(torch.export.export(Normalize(), (images,)).module()(images), normalize(images))
