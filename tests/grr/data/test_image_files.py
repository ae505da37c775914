"""Finding image files, and reading them in batches with a reason for each bad file."""

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grr.data.image_files import batches, find_images, read_batches, read_images, thumbnails
from grr.data.images import BadImage, _formats, load_image


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(images: Path | str, below: Path) -> list[str]:
    return [os.path.relpath(file, below) for file in find_images(images)]


@given(count=st.integers(0, 40), size=st.integers(1, 12), bad=st.sets(st.integers(0, 39)))
def test_every_item_is_read_once_in_its_batch_or_reported(count, size, bad):
    def read(i: int) -> torch.Tensor:
        if i in bad:
            raise (BadImage, OSError, MemoryError, RecursionError)[i % 4](f"no. {i}")
        return torch.tensor([i])

    expected = list(batches(list(range(count)), size))
    done = list(read_batches(read, expected))
    assert [sorted([*b.good, *b.bad]) for b in done] == expected
    for batch in done:
        assert batch.good == sorted(set(batch.good) - bad)
        assert (batch.pixels is None) == (not batch.good)
        assert batch.pixels is None or batch.pixels.flatten().tolist() == batch.good
        assert batch.bad == {i: f"no. {i}" for i in sorted([*batch.good, *batch.bad]) if i in bad}


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), StopIteration()], ids=repr)
def test_an_error_that_is_not_an_exception_ends_the_reading(error):
    def read(i: int) -> torch.Tensor:
        raise error

    with pytest.raises(RuntimeError, match="a thread that reads data must not raise"):
        list(read_batches(read, [[0, 1], [2]]))


def test_exactly_one_batch_is_read_ahead():
    loads = threading.Semaphore(0)
    loaded = []

    def load(i: int) -> torch.Tensor:
        loaded.append(i)
        loads.release()
        return torch.zeros(1)

    stream = read_batches(load, ([i] for i in range(10)))
    next(stream)
    for _ in range(2):
        assert loads.acquire(timeout=10)
    assert loaded == [0, 1]
    stream.close()


def test_a_folder_yields_files_with_the_suffix_of_an_image_at_any_depth(tmp_path):
    touch(tmp_path, "b.jpg", "a.PNG", "notes.txt", "deep/er/c.webp", "deep/d.jpeg", "jpg")
    assert found(tmp_path, tmp_path) == ["a.PNG", "b.jpg", "deep/d.jpeg", "deep/er/c.webp"]


def test_a_glob_yields_all_but_folders_and_a_file_name_itself(tmp_path):
    touch(tmp_path, "b.jpg", "notes.txt", "deep/c.webp", "odd[1].jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert found(f"{tmp_path}/*", tmp_path) == ["b.jpg", "folder.jpg", "notes.txt", "odd[1].jpg"]
    assert found(f"{tmp_path}/**/*.webp", tmp_path) == ["deep/c.webp"]
    assert found(tmp_path / "odd[1].jpg", tmp_path) == ["odd[1].jpg"]


def test_links_to_folders_are_followed_once_and_broken_links_are_reported(tmp_path):
    touch(tmp_path / "elsewhere", "a.jpg")
    touch(tmp_path / "mine", "b.jpg")
    (tmp_path / "mine/loop").symlink_to(tmp_path / "mine")
    (tmp_path / "mine/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/broken.png").symlink_to("nowhere")
    assert found(tmp_path / "mine", tmp_path) == ["mine/again/a.jpg", "mine/b.jpg", "mine/broken.png"]


def test_a_folder_that_cannot_be_read_is_reported(tmp_path):
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        if os.access(tmp_path / "closed", os.R_OK):
            pytest.skip("root can read any folder")
        assert found(tmp_path, tmp_path) == ["a.jpg", "closed"]
    finally:
        (tmp_path / "closed").chmod(0o700)


@pytest.mark.parametrize("where", ["", "nowhere", "*.jpg"])
def test_a_path_without_images_is_an_error_with_a_remedy(tmp_path, where):
    with pytest.raises(FileNotFoundError, match=r"find_images: there is no image in .*; pass a file, a folder"):
        find_images(f"{tmp_path}/{where}")


def test_files_are_read_at_the_size_and_crop_of_the_model(tmp_path):
    for i in range(5):
        Image.effect_mandelbrot((30 + i, 20), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    first, second = read_images(find_images(tmp_path), image_size=16, crop="center", batch_size=3)
    assert [Path(file).name for file in (*first.good, *second.good)] == ["0.png", "1.png", "2.png", "4.png"]
    assert torch.equal(first.pixels[1], load_image(tmp_path / "1.png", size=16, crop="center"))
    assert second.bad == {str(tmp_path / "3.png"): "not a readable image: the file is empty"}


def test_neither_a_pipe_nor_a_device_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    (batch,) = read_images(find_images(tmp_path), image_size=16, crop="squash", batch_size=3)
    reasons = [f"not a readable image: must be a regular file, but is a {kind}" for kind in ("pipe", "device")]
    assert list(batch.bad.values()) == reasons


def test_a_thumbnail_keeps_the_aspect_ratio(tmp_path):
    Image.new("RGB", (1000, 400), "red").save(tmp_path / "a.jpg")
    Image.new("RGB", (10, 40), "blue").save(tmp_path / "b.png")
    Image.new("RGB", (5000, 1), "blue").save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(b"no")
    small = dict(thumbnails(find_images(tmp_path), side=100))
    shapes = [list(x.shape) if isinstance(x, torch.Tensor) else x for x in small.values()]
    assert shapes == [
        [3, 40, 100],
        [3, 40, 10],
        [3, 1, 100],
        "not a readable image: its content is none of " + ", ".join(_formats()),
    ]
