"""Hostile image files start no program, take little memory, do not block, and are reported as bad images."""

import io
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import grr
from grr.data.images import FORMATS, MAX_BYTES, MAX_SCANS, SUFFIXES, BadImage, _formats, load_image, to_tensor

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\nshowpage\n%%EOF\n"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(name: bytes, data: bytes) -> bytes:
    """Returns a PNG of 8 x 8 pixels with one more chunk before its pixels."""
    plain = encoded(Image.new("RGB", (8, 8)), "PNG")
    cut = plain.index(b"IDAT") - 4
    return plain[:cut] + chunk(name, data) + plain[cut:]


# Programs


def test_an_eps_named_jpg_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho started > {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(EPS)
    with pytest.raises(BadImage, match="its content is none of JPEG, PNG"):
        load_image(tmp_path / "a.jpg", size=32)
    assert not (tmp_path / "ran").exists()


def test_every_format_that_an_image_set_has_is_read_and_no_other():
    Image.init()
    assert set(_formats()) == set(FORMATS) & set(Image.OPEN)
    of_suffix = Image.registered_extensions()
    named = {of_suffix[suffix] for suffix in SUFFIXES if suffix in of_suffix}
    assert named == set(_formats())
    for kind in ("TGA", "PCX", "SGI", "ICNS", "ICO", "DDS"):  # which Pillow can write and read
        with pytest.raises(BadImage, match="its content is none of"):
            load_image(encoded(Image.new("RGB", (32, 32)), kind), size=8)


def test_images_are_opened_in_one_place():
    source = Path(grr.__file__).parent
    opening = [file.name for file in sorted(source.rglob("*.py")) if "Image.open(" in file.read_text()]
    assert opening == ["images.py", "run_onnx.py"]  # the latter is copied to an export and runs without this library


# Names


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device", "a folder"])
def test_a_file_that_is_not_regular_is_a_bad_image(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        (listener := socket.socket(socket.AF_UNIX)).bind(str(path))
        listener.close()
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(BadImage, match=f"not a readable image: must be a regular file, but is {kind}"):
        load_image(path, size=8)


@pytest.mark.parametrize("name", ["a\0.jpg", "\ud800.jpg"])
def test_a_name_that_no_file_can_have_is_a_bad_image(tmp_path, name):
    with pytest.raises(BadImage, match="not a readable image: "):
        load_image(f"{tmp_path}/{name}", size=8)


def test_a_file_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # takes no space on the disk
    with pytest.raises(BadImage, match="has 536,870,913 bytes; at most 536,870,912 are read"):
        load_image(tmp_path / "a.png", size=8)


# Numbers


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_without_a_finite_number_is_bad(value):
    with pytest.raises(BadImage, match="none of its pixels is a finite number"):
        load_image(encoded(Image.fromarray(np.full((9, 9), value, np.float32)), "TIFF"), size=8)


def test_pixels_that_are_not_finite_become_black_or_white_and_change_no_other_pixel():
    values = np.tile(np.linspace(0, 1, 8, dtype=np.float32), (8, 1))
    odd = values.copy()
    odd[0, :3] = np.nan, np.inf, -np.inf
    pixels, plain = (to_tensor(Image.fromarray(x), size=8)[0] for x in (odd, values))
    assert pixels[0, :3].tolist() == [0, 255, 0]
    assert pixels[1:].equal(plain[1:])
    assert pixels[0, 3:].equal(plain[0, 3:])


@pytest.mark.parametrize("mode", ["I;16", "F", "I", "RGBA", "LA", "CMYK", "P"])
def test_converting_an_image_in_strips_equals_converting_it_at_once(mode, monkeypatch):
    ramp = np.add.outer(np.arange(70), np.arange(50))
    kind = {"I;16": np.uint16, "F": np.float32, "I": np.int32}.get(mode)
    if kind is None:
        image = Image.fromarray((2 * ramp).astype(np.uint8)).convert("RGB").convert(mode)
    else:
        image = Image.fromarray((500 * ramp - (mode == "I") * 9000).astype(kind))
    whole = to_tensor(image, size=40)
    monkeypatch.setattr("grr.data.rgb.STRIP", 50 * 3)  # strips of three rows, the last of one
    assert to_tensor(image, size=40).equal(whole)


# Memory


MEASURE = """
import io, sys
from PIL import Image
from grr.data.images import load_image
def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024
def growth(data):
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = memory("VmRSS")
    try:
        load_image(data, size=64)
    except ValueError as error:
        print(error, file=sys.stderr)
    return memory("VmHWM") - before
def encoded(mode, kind, side, **options):
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, kind, **options)
    return file.getvalue()
exif = Image.Exif()
exif[0x0112] = 6
turned = exif.tobytes()
load_image(encoded("RGB", "PNG", 8), size=64)
"""
linux = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")


def growth(images: dict[str, str]) -> dict[str, float]:
    """Returns the peak memory of decoding, in bytes, of images by name; each is a Python expression."""
    program = MEASURE + "".join(f"print(growth({image}))\n" for image in images.values())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    return dict(zip(images, map(float, done.stdout.split()), strict=True))


@linux
def test_decoding_takes_at_most_16_bytes_a_pixel():
    save = "encoded({!r}, 'TIFF', 2000, compression='tiff_deflate', exif=turned)"  # includes a rotated copy
    taken = growth({mode: save.format(mode) for mode in ("I;16", "I", "F", "RGBA", "LA", "CMYK")})
    assert {mode: size / 2000**2 for mode, size in taken.items() if size > 16 * 2000**2} == {}


@linux
def test_a_small_file_that_inflates_takes_little_memory(tmp_path):
    zeros = zlib.compress(bytes(300_000_000), 9)
    gif = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    place = gif.index(b"\x2c", 13 + 3) + 5  # an image descriptor: left, top, then width and height
    gif[place : place + 4] = struct.pack("<HH", 60_000, 60_000)
    page = Image.new("1", (40_000, 40_000))
    pages = {"save_all": True, "append_images": [page], "compression": "group4"}
    bombs = {
        "color profile": png_with(b"iCCP", b"x\0\0" + zeros),
        "text": png_with(b"zTXt", b"x\0\0" + zeros),
        "international text": png_with(b"iTXt", b"x\0\1\0\0\0" + zeros),
        "frame of a GIF": bytes(gif),
        "second page of a TIFF": encoded(Image.new("1", (8, 8)), "TIFF", **pages),
    }
    for name, data in bombs.items():
        assert len(data) < 1_000_000
        (tmp_path / name).write_bytes(data)
    taken = growth({name: f"open({str(tmp_path / name)!r}, 'rb').read()" for name in bombs})
    assert {name: size for name, size in taken.items() if size > 100e6} == {}


def test_a_jpeg_of_many_scans_is_refused():
    data = encoded(Image.new("RGB", (32, 32), "red"), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    hostile = data[:scan] + data[scan:-2] * (MAX_SCANS + 1) + data[-2:]
    with pytest.raises(BadImage, match=r"a JPEG of \d+ scans; at most 500 are decoded"):
        load_image(hostile, size=8)
    assert load_image(data, size=8)[0].min() > 250


def test_scans_that_follow_a_complete_one_are_not_counted_and_those_of_other_frames_are():
    """A segment that is skipped may hold another frame, as the thumbnail of EXIF does."""
    image = Image.effect_noise((64, 64), 64).convert("RGB")
    files = {}
    for name, options in {"sequential": {}, "progressive": {"progressive": True}}.items():
        file = io.BytesIO()
        image.save(file, "JPEG", **options)
        files[name] = file.getvalue()
    many = b"\xff\xda" * 600
    assert load_image(files["sequential"] + many, size=8).shape == (3, 8, 8)
    thumbnail = b"\xff\xe1" + (2 + len(files["sequential"])).to_bytes(2, "big") + files["sequential"]
    for start in (b"", thumbnail):
        with pytest.raises(BadImage, match=r"a JPEG of 6\d\d scans; at most 500 are decoded"):
            load_image(b"\xff\xd8" + start + files["progressive"][2:] + many, size=8)
