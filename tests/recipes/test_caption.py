"""The recipe as a user meets it: a folder of whatever lies in it, one command, captions and a page."""

import json
import os
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import run
from waiting import started, wait_until

from grr import config
from grr.inference.results import read_results

RECIPE = Path(__file__).resolve().parents[2] / "recipes/caption.py"
CONFIGS = sorted((RECIPE.parent / "configs/caption").glob("*.yaml"))
DEFAULT = RECIPE.parent / "configs/caption/default.yaml"


def caption(monkeypatch, *words: str) -> int:
    """Run the recipe in this process; gives its exit status."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--config", str(DEFAULT), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(RECIPE), run_name="__main__")
    return end.value.code


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG that says how large it is, and hardly anything after it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def good_files(folder: Path) -> dict[str, str]:
    """Images that are odd, and what a person sees in them: a colour."""
    red = Image.new("RGB", (64, 48), "red")
    red.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((40, 40), 65535, np.uint16)).save(folder / "16 bits.png")
    red.save(folder / "animated.gif", save_all=True, append_images=[Image.new("RGB", (64, 48), "blue")], duration=50)
    palette = Image.new("P", (30, 30), 0)
    palette.putpalette([255, 0, 0] * 256)
    palette.save(folder / "clear palette.png", transparency=0)
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(folder / "clear.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 20), "blue").save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), "yellow").save(folder / "one pixel.bmp")
    Image.new("RGB", (9000, 2), "yellow").save(folder / "very wide.png")
    Image.new("RGB", (2, 9000), "yellow").save(folder / "very high.tiff")
    Image.new("1", (16, 16), 1).save(folder / "one bit.tif")
    for name in (
        "new\nline.png",
        "ünï 漢字 😀.jpg",
        "-rf *.png",
        "<b>&amp;'\".png",
        "tab\t\x1b[2J.png",
        "CAPITALS.JPG",
    ):
        Image.new("RGB", (20, 20), "blue").save(folder / name)
    Image.new("RGB", (20, 20), "red").save(os.fsencode(folder) + b"/not \xff utf-8.png")
    red.save(folder / "a jpeg.png", "JPEG")
    os.symlink("cmyk.jpg", folder / "link.jpg")
    (folder / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (20, 20), "black").save(folder / "deep/er/black.png")
    return {
        "cmyk.jpg": "red",
        "16 bits.png": "white",
        "animated.gif": "red",
        "clear palette.png": "white",
        "clear.webp": "white",
        "turned.jpg": "blue",
        "one pixel.bmp": "yellow",
        "very wide.png": "yellow",
        "very high.tiff": "yellow",
        "one bit.tif": "white",
        "new\nline.png": "blue",
        "ünï 漢字 😀.jpg": "blue",
        "-rf *.png": "blue",
        "<b>&amp;'\".png": "blue",
        "tab\t\x1b[2J.png": "blue",
        "CAPITALS.JPG": "blue",
        os.fsdecode(b"not \xff utf-8.png"): "red",
        "a jpeg.png": "red",
        "link.jpg": "red",
        "deep/er/black.png": "black",
    }


def bad_files(folder: Path) -> dict[str, str]:
    """What cannot be captioned, and a piece of the reason."""
    Image.effect_noise((400, 300), 90).convert("RGB").save(folder / "whole.jpg")
    torn = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "torn.jpg").write_bytes(torn[: len(torn) // 2])
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")
    (folder / "empty.png").touch()
    (folder / "zeros.png").write_bytes(bytes(5000))
    (folder / "bomb.png").write_bytes(png(60_000, 60_000))
    (folder / "no pixels.png").write_bytes(png(0, 0))
    (folder / "vector.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    result = {
        "torn.jpg": "truncated",
        "page.jpg": "is none of JPEG",
        "empty.png": "is empty",
        "zeros.png": "is none of JPEG",
        "bomb.png": "decompression bomb",
        "no pixels.png": "",
        "vector.png": "is none of JPEG",
        "phone.heic": "",
        "broken.jpg": "No such file",
        "itself.jpg": "symbolic links",
        "folder.jpg": "a folder",
        "pipe.jpg": "a pipe",
        "device.jpg": "device",
    }
    (folder / "secret.png").write_bytes(b"")
    (folder / "secret.png").chmod(0)
    result["secret.png"] = "is empty" if os.access(folder / "secret.png", os.R_OK) else "Permission denied"
    return result


def test_no_file_stops_it_and_each_bad_one_is_named_with_its_reason(colour_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    good, bad = good_files(tmp_path / "mine"), bad_files(tmp_path / "mine")
    (tmp_path / "mine/notes.txt").write_text("no image, and not named as one")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path / "mine")
        listener.bind("socket.png")
        bad["socket.png"] = "socket"
        monkeypatch.chdir(tmp_path)
        assert caption(monkeypatch, f"model.path={colour_run}", "run.images=mine", "run.batch_size=7") == 0

    rows = {os.path.relpath(row["file"], "mine"): row for row in read_results(Path("captions/captions.jsonl"))}
    assert rows.keys() == good.keys() | bad.keys()
    for name, colour in good.items():
        assert rows[name].get("caption") == f"a {colour} picture", rows[name]
    for name, reason in bad.items():
        assert reason in rows[name]["error"], rows[name]
    said = capsys.readouterr().out
    assert f"{len(good)} images captioned; {len(bad)} could not be read:" in said
    page = Path("captions/captions.html").read_text()
    for name in bad:
        assert f"mine/{name}: " in said
        assert f"<li>mine/{name}: " in page
    assert page.count("<img src=") == len(good)
    assert "\x1b" not in said  # a file's name moves no cursor


def test_nothing_but_bad_files_is_a_failure_and_names_them(colour_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.png").touch()
    words = [f"model.path={colour_run}", f"run.images={tmp_path}", f"run.folder={tmp_path / 'out'}"]
    assert caption(monkeypatch, *words) == 1
    assert "0 images captioned; 1 could not be read:" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/captions.jsonl").read_text())["error"].endswith("the file is empty")


@pytest.mark.slow
def test_a_copied_recipe_that_is_killed_goes_on_by_the_same_command(colour_run, tmp_path):
    (tmp_path / "mine").mkdir()
    colours = ("red", "green", "blue", "yellow", "white", "black")
    for i in range(240):
        Image.new("RGB", (8, 8), colours[i % 6]).save(tmp_path / f"mine/{i:03d}.png")
    shutil.copy(RECIPE, tmp_path / "my_caption.py")
    command = [
        sys.executable,
        "my_caption.py",
        "--config",
        str(DEFAULT),
        f"model.path={colour_run}",
        "run.images=mine",
        "run.batch_size=2",
    ]
    options = {
        "cwd": tmp_path,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    output = tmp_path / "captions/captions.jsonl"
    with started(command, **options) as running:
        wait_until(lambda: len(read_results(output)) >= 20, running)
    before = read_results(output)
    assert 20 <= len(before) < 240
    with output.open("ab") as lines:
        lines.write(b'{"file": "mine/239.png", "capt')

    done = run(command[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_results(output)
    assert rows[: len(before)] == before
    assert [row["file"] for row in rows] == [f"mine/{i:03d}.png" for i in range(240)]
    assert all(row["caption"] == f"a {colours[i % 6]} picture" for i, row in enumerate(rows))
    assert f"240 images captioned, {len(before)} of them before\n" in done.stdout
    assert "240/240" in done.stderr


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it(file):
    sys.path.insert(0, str(RECIPE.parent))
    from caption import SECTIONS

    words = ["--config", str(file), "model.path=runs/openmoji", "run.images=photos"]
    cfg = config.load(SECTIONS, words)
    assert cfg.generation["temperature"] == 0
    assert f"recipes/caption.py --config recipes/configs/caption/{file.name}" in file.read_text().split("\nrun:")[0]
