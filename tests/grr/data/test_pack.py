"""Packed data are the data: captions, ids of shards, pixels within the loss of JPEG; kills, bad images, refusals."""

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grr.cli import main
from grr.data import coco, folder, karpathy, webdataset
from grr.data.formats.pack import STATE, pack
from grr.data.images import shrink_file
from grr.data.pairs import Pairs

SIZE = 32


def photo(number: int, width: int = 120, height: int = 80) -> bytes:
    """A smooth picture, so that the loss of JPEG is small."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def write_shards(root: Path, shards: int = 3, images: int = 8) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        with tarfile.open(root / f"{s:05d}.tar", "w") as tar:
            for i in range(images):
                texts = {"txt": f"picture {i} of {s}".encode()}
                if i % 3 == 1:
                    texts = {"json": json.dumps({"caption": ["one", f"two {i}", "", "three é"]}).encode()}
                if i % 3 == 2:
                    texts = {"txt": "\ufeff\ufeffwith a mark".encode()}
                for ending, content in ({"jpg": photo(100 * s + i)} | texts).items():
                    member = tarfile.TarInfo(f"{i:03d}.a.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_folder(root: Path, images: int = 20) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "sub").mkdir(exist_ok=True)
    lines = ["image,caption"]
    for i in range(images):
        name = f"{'sub/' if i % 2 else ''}{i}.jpg"
        (root / name).write_bytes(photo(i, *((80, 120) if i % 2 else (120, 80))))
        lines.append(f"{name},picture {i}")
    lines += [f"{i}.jpg,again {i}" for i in range(0, images, 2)]
    (root / "captions.csv").write_text("\n".join(lines))


def captions_of_images(pairs: Pairs) -> Counter:
    images: dict[int, list[str]] = {}
    for caption, image in zip(pairs.captions, pairs.image_of.tolist(), strict=True):
        images.setdefault(image, []).append(caption)
    return Counter(tuple(captions) for captions in images.values())


def difference(one: Pairs, i: int, other: Pairs, j: int, crop: str) -> float:
    a, b = (pairs.load(k, size=SIZE, crop=crop).float() for pairs, k in ((one, i), (other, j)))
    return float((a - b).abs().mean())


@pytest.mark.parametrize("squash", [False, True])
def test_packed_shards_are_the_same_pairs_with_nearly_the_same_pixels(tmp_path, squash):
    write_shards(tmp_path / "raw")
    for split in (None, "train", "validation"):
        raw = webdataset(shards=str(tmp_path / "raw"), split=split, validation_fraction=0.4)
        counts = pack(raw, tmp_path / f"{split}", size=SIZE, squash=squash)
        packed = webdataset(shards=str(tmp_path / f"{split}"))
        assert packed.fingerprint == raw.fingerprint  # ids, captions and their order
        assert packed.image_of.tolist() == np.unique(raw.image_of, return_inverse=True)[1].tolist()
        assert (counts.pairs, counts.images, counts.skipped) == (len(raw), len(set(raw.image_of)), 0)
        for i in range(len(raw)):
            for crop in ("squash",) if squash else ("squash", "center", "clip"):
                assert difference(raw, i, packed, i, crop) < 3
    whole = webdataset(shards=str(tmp_path / "None"), split="validation", validation_fraction=0.4)
    assert list(whole.ids) == list(packed.ids)  # the split of packed shards is that of the raw ones


def test_a_packed_folder_has_its_captions_and_each_image_once(tmp_path):
    write_folder(tmp_path / "raw")
    raw = folder(path=str(tmp_path / "raw"))
    pack(raw, tmp_path / "packed", size=SIZE, shard_size=8)
    packed = webdataset(shards=str(tmp_path / "packed"))
    assert captions_of_images(packed) == captions_of_images(raw)
    assert [p.name for p in sorted((tmp_path / "packed").glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]
    members = list[str]()
    for file in (tmp_path / "packed").glob("*.tar"):
        with tarfile.open(file) as tar:
            members += tar.getnames()
    assert sum(name.endswith(".jpg.jpg") for name in members) == 20
    of_image = {name.partition("/")[2].partition("#")[0]: i for i, name in enumerate(packed.ids)}
    for i, name in enumerate(raw.ids):
        for crop in ("squash", "center", "clip"):
            assert difference(raw, i, packed, of_image[name.partition("#")[0]], crop) < 3


@pytest.mark.parametrize("layout", ["coco", "karpathy"])
def test_annotations_are_packed(tmp_path, layout):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(photo(i))
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)]
    content: dict = {"images": images, "annotations": [{"image_id": i % 4, "caption": f"c{i}"} for i in range(12)]}
    if layout == "karpathy":
        sentences = [[{"raw": f"c{i} {k}"} for k in range(5)] for i in range(4)]
        content = {"images": [{"filename": f"{i}.jpg", "split": "train", "sentences": sentences[i]} for i in range(4)]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    arguments = {"annotations": str(tmp_path / "a.json"), "images": str(tmp_path)}
    raw = coco(**arguments) if layout == "coco" else karpathy(**arguments, split="train")
    assert pack(raw, tmp_path / "packed", size=SIZE).pairs == len(raw)
    assert captions_of_images(webdataset(shards=str(tmp_path / "packed"))) == captions_of_images(raw)


@pytest.mark.parametrize(
    ("shape", "size", "squash", "stored"),
    [
        ((120, 80), 32, False, (48, 32)),
        ((80, 120), 32, False, (32, 48)),
        ((120, 80), 32, True, (32, 32)),
        ((20, 10), 32, False, (20, 10)),
        ((20, 10), 32, True, (32, 32)),
        ((900, 1), 1, False, (900, 1)),
    ],
)
def test_the_shorter_side_has_the_size_and_no_image_is_enlarged_unless_it_is_squashed(shape, size, squash, stored):
    content = shrink_file(photo(0, *shape), size=size, quality=90, squash=squash)
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", stored)


def test_an_image_that_cannot_be_read_is_counted_and_left_out(tmp_path):
    write_folder(tmp_path / "raw")
    (tmp_path / "raw/4.jpg").write_bytes(b"no image")
    (tmp_path / "raw/sub/7.jpg").unlink()
    raw = folder(path=str(tmp_path / "raw"))
    counts = pack(raw, tmp_path / "packed", size=SIZE)
    packed = webdataset(shards=str(tmp_path / "packed"))
    assert counts.pairs == len(packed) == len(raw) - 3
    assert counts.pairs + counts.skipped == len(raw)
    assert [name for name, _ in counts.bad] == ["4.jpg", "sub/7.jpg"]
    assert pack(raw, tmp_path / "packed", size=SIZE) == counts  # nothing is left to do


KILLED = """
import os, sys
from grr.data import webdataset
from grr.data.formats import pack as module
written = []
def stop(image, *rest, _file=module._caption_file):
    written.append(image)
    if len(written) > 11:
        os.kill(os.getpid(), 9)
    return _file(image, *rest)
module._caption_file = stop
module.pack(webdataset(shards=sys.argv[1]), module.Path(sys.argv[2]), size=32)
"""


def test_a_killed_pack_continues_and_complete_shards_are_not_written_again(tmp_path):
    write_shards(tmp_path / "raw")
    raw = webdataset(shards=str(tmp_path / "raw"))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "raw"), str(tmp_path / "packed")]
    assert subprocess.run(command, check=False, timeout=300).returncode == -9
    assert sorted(p.name for p in (tmp_path / "packed").iterdir()) == ["00000.tar", "00001.tar.tmp", STATE]
    before = (tmp_path / "packed/00000.tar").stat().st_mtime_ns
    time.sleep(0.01)
    counts = pack(raw, tmp_path / "packed", size=SIZE)
    assert (tmp_path / "packed/00000.tar").stat().st_mtime_ns == before
    whole = pack(raw, tmp_path / "whole", size=SIZE)
    assert counts == whole
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "packed").iterdir()) == ["00000.tar", "00001.tar", "00002.tar", STATE]


def test_a_shard_that_was_lost_after_it_was_written_is_written_again(tmp_path):
    write_shards(tmp_path / "raw")
    pairs, packed = webdataset(shards=str(tmp_path / "raw")), tmp_path / "packed"
    pack(pairs, packed, size=SIZE, quality=90)
    lost = sorted(packed.glob("*.tar"))[1]
    content = lost.read_bytes()
    lost.unlink()
    pack(pairs, packed, size=SIZE, quality=90)
    assert lost.read_bytes() == content


def test_a_folder_of_other_data_and_data_that_are_not_files_are_refused(tmp_path):
    write_folder(tmp_path / "raw", 4)
    raw = folder(path=str(tmp_path / "raw"))
    with pytest.raises(ValueError, match=r"must be empty or hold these data, got 0.jpg, 2.jpg, captions.csv"):
        pack(raw, tmp_path / "raw", size=SIZE)
    pack(raw, tmp_path / "packed", size=SIZE)
    with pytest.raises(ValueError, match="got others, which differ in size; name another folder"):
        pack(raw, tmp_path / "packed", size=SIZE + 1)
    shutil.copytree(tmp_path / "packed", tmp_path / "a/packed")
    shutil.copytree(tmp_path / "packed", tmp_path / "b/packed")
    with pytest.raises(ValueError, match=r"must have different names, got two 00000\.tar"):
        pack(webdataset(shards=str(tmp_path / "*/packed/*.tar")), tmp_path / "both", size=SIZE)
    with pytest.raises(ValueError, match=r"quality must be from 1 to 95, got 96"):
        pack(raw, tmp_path / "packed", size=SIZE, quality=96)
    with pytest.raises(ValueError, match=r"must be image files or shards .*got DatasetPairs"):
        pack(Pairs.from_dataset([{"i": photo(0), "c": "x"}], image="i", caption="c"), tmp_path / "c", size=SIZE)


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    write_folder(tmp_path / "raw", 4)
    raw = folder(path=str(tmp_path / "raw"))
    (tmp_path / "packed").mkdir()
    descriptor = os.open(tmp_path / "packed", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="is being written by another process; wait for it"):
        pack(raw, tmp_path / "packed", size=SIZE)
    os.close(descriptor)
    assert pack(raw, tmp_path / "packed", size=SIZE).images == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--section vaildation",
            "--section must be a section of data, got vaildation (did you mean validation?); those of",
        ),
        ("--section model", "got model; those of"),
        ("--section _functions", "photos.yaml are data, validation\n"),
        ("--quality 0", "grr pack: quality must be from 1 to 95, got 0; 90 is a good choice"),
        ("--quality 101", "grr pack: quality must be from 1 to 95, got 101; 90 is a good choice"),
        ("--size 0", "grr pack: size must be from 1 to 4096 pixels, got 0; give the size that"),
        ("--size 1000000", "grr pack: size must be from 1 to 4096 pixels, got 1000000; give the size that"),
    ],
)
def test_an_argument_of_the_command_is_refused_before_the_data_are_read(tmp_path, capsys, words, said):
    absent = f"data.path={tmp_path / 'absent'}"
    assert main(["pack", "pretrain/photos", absent, "--output", str(tmp_path / "packed"), *words.split()]) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("_functions") == words.count("_functions")
    assert not list(tmp_path.iterdir())


def test_the_command_packs_the_data_of_a_config_and_prints_the_next_one(tmp_path, capsys):
    write_folder(tmp_path / "raw", 6)
    (tmp_path / "raw/4.jpg").write_bytes(b"no image")
    words = ["pack", "pretrain/photos", f"data.path={tmp_path / 'raw'}", "--output", str(tmp_path / "packed")]
    assert main([*words, "data.split=null", "--size", "32"]) == 0
    printed = capsys.readouterr().out
    assert "7 pairs of 5 images" in printed
    assert "left out: 2 pairs of 1 images that cannot be read:" in printed
    assert "4.jpg: not a readable image" in printed
    assert f"next: grr run ... data.name=webdataset data.shards='{tmp_path / 'packed'}/*.tar'" in printed
    assert len(webdataset(shards=str(tmp_path / "packed"))) == 7
