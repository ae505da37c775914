"""Every format, on real files where there are some, gives the pairs that its own libraries would."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grr.data import DATASETS
from grr.data.annotations import coco, karpathy
from grr.data.pairs import Texts
from grr.data.shards import webdataset
from grr.data.tables import folder, rocov2


def picture(file: Path, colour: str = "red") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(file)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))), rows=st.data())
def test_texts_in_one_block_are_the_texts(texts, rows):
    block = Texts.of(texts)
    assert list(block) == texts
    assert [block[i] for i in range(len(block))] == texts
    keep = np.array(rows.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))), dtype=bool)
    kept = [text for text, k in zip(texts, keep, strict=True) if k]
    assert list(block.take(keep)) == kept
    assert block.take(keep).digest() == Texts.of(kept).digest()


def test_coco_gives_each_caption_with_its_image(shared_data):
    root = shared_data / "coco_mini"
    pairs = coco(annotations=str(root / "annotations/captions_train2017.json"), images=str(root / "train2017"))
    content = json.loads((root / "annotations/captions_train2017.json").read_text())
    assert len(pairs) == len(content["annotations"])
    file_of = {image["id"]: image["file_name"] for image in content["images"]}
    for i, annotation in enumerate(content["annotations"]):
        assert pairs.captions[i] == " ".join(annotation["caption"].split())
        assert pairs.ids[i].startswith(file_of[annotation["image_id"]] + "#")
    assert len(np.unique(pairs.image_of)) == len(content["images"])
    assert pairs.load(0, size=32, crop="squash").shape == (3, 32, 32)


@pytest.mark.parametrize(("split", "images"), [("train", 3000), ("val", 500), ("test", 500)])
def test_karpathy_gives_five_captions_an_image_in_each_split(shared_data, split, images):
    root = shared_data / "photos"
    pairs = karpathy(annotations=str(root / "dataset_photos.json"), images=str(root / "images"), split=split)
    assert len(pairs) == 5 * images
    assert (np.bincount(pairs.image_of) == 5).all()
    assert pairs.load(7, size=32, crop="center").shape == (3, 32, 32)


def test_karpathy_of_coco_takes_restval_for_training_and_the_file_path(tmp_path):
    def image(split: str, name: str) -> dict:
        return {"filename": name, "filepath": "val2014", "split": split, "sentences": [{"raw": " a  cat\n"}]}

    picture(tmp_path / "val2014/b.jpg")
    content = {"images": [image("test", "a.jpg"), image("restval", "b.jpg"), image("train", "c.jpg")]}
    (tmp_path / "d.json").write_text(json.dumps(content))
    pairs = karpathy(annotations=str(tmp_path / "d.json"), images=str(tmp_path), split="train")
    assert list(pairs.ids) == ["val2014/b.jpg#0", "val2014/c.jpg#0"]
    assert list(pairs.captions) == ["a cat", "a cat"]
    assert pairs.load(0, size=8, crop="squash").shape == (3, 8, 8)


@pytest.mark.parametrize(("name", "text"), [
    ("captions.csv", 'Image,Caption\na.png,"one, two"\nb.png,three\n'),
    ("captions.tsv", "file_name\ttext\na.png\tone, two\nb.png\tthree\n"),
    ("captions.jsonl", '{"image": "a.png", "caption": "one, two"}\n\n{"image": "b.png", "caption": "three"}\n'),
    ("captions.txt", "a.png#0\tone, two\nb.png#0\tthree\n"),
    ("captions.csv", '\ufeffimage,caption,split\na.png,"one, two",train\nb.png,three,train\nc.png,no,val\n'),
])  # fmt: skip
def test_a_folder_with_a_table_of_any_kind(tmp_path, name, text):
    for image in "abc":
        picture(tmp_path / f"{image}.png")
    (tmp_path / name).write_text(text)
    pairs = folder(path=str(tmp_path), split="train" if "split" in text else None)
    assert list(pairs.captions) == ["one, two", "three"]
    assert list(pairs.ids) == ["a.png#0", "b.png#0"]


def test_the_split_of_a_folder_moves_no_image_when_others_come(tmp_path):
    def splits(count: int) -> list[set[str]]:
        rows = "".join(f"{i}.png,{c}\n" for i in range(count) for c in ("x", "y"))
        (tmp_path / "captions.csv").write_text("image,caption\n" + rows)
        parts = [folder(path=str(tmp_path), split=s, validation_fraction=0.3) for s in ("train", "validation")]
        return [{name.split("#")[0] for name in part.ids} for part in parts]

    picture(tmp_path / "0.png")
    few, many = splits(50), splits(100)
    for before, after in zip(few, many, strict=True):
        assert before <= after
    assert not many[0] & many[1]
    assert len(many[0] | many[1]) == 100
    assert 10 < len(many[1]) < 50


def test_real_flickr_tables_are_read(shared_data, tmp_path):
    for source, name in (("flickr30k_kaggle_style.head200.csv", "captions.csv"),
                         ("flickr8k_kaggle_captions.head200.txt", "captions.txt"),
                         ("flickr8k.token.head400.txt", "flickr8k.token.txt")):  # fmt: skip
        place = tmp_path / name
        place.mkdir()
        shutil.copy(shared_data / "formats" / source, place / name)
        first = (place / name).read_text().splitlines()[1]
        picture(place / "images" / first.split("#")[0].split(",")[0])
        pairs = folder(path=str(place), split=None)
        assert len(pairs) >= 199
        assert max(len(caption.split()) for caption in pairs.captions) < 60
        assert all(name.split("#")[0].endswith(".jpg") for name in pairs.ids)


def test_rocov2_with_a_byte_order_mark_quotes_and_newlines(tmp_path):
    rows = [("ROCO_1", 'a "quoted", long\ncaption'), ("ROCO_2", "µCT of a hip")]
    text = io.StringIO()
    csv.writer(text).writerows([("ID", "Caption"), *rows])
    (tmp_path / "valid_captions.csv").write_text("\ufeff" + text.getvalue(), newline="")
    picture(tmp_path / "valid_images/valid/ROCO_1.jpg")
    pairs = rocov2(path=str(tmp_path), split="valid")
    assert list(pairs.captions) == ['a "quoted", long caption', "µCT of a hip"]
    assert pairs.load(0, size=8, crop="squash").shape == (3, 8, 8)


def test_real_shards_give_what_tarfile_gives(shared_data, tmp_path):
    shutil.copy(shared_data / "formats/img2dataset_00000.tar", tmp_path / "00000.tar")
    pairs = webdataset(shards=str(tmp_path / "*.tar"))
    with tarfile.open(tmp_path / "00000.tar") as tar:
        names = tar.getnames()
        keys = [name[:-4] for name in names if name.endswith(".jpg")]
        captions = {k: tar.extractfile(f"{k}.txt").read().decode() for k in keys if f"{k}.txt" in names}
    assert [name.split("/")[-1] for name in pairs.ids] == keys
    assert len(keys) >= 10
    for i, key in enumerate(keys):
        if key in captions:
            assert pairs.captions[i] == " ".join(captions[key].split())
    for i in range(len(pairs)):
        assert pairs.load(i, size=8, crop="squash").shape == (3, 8, 8)
    again = webdataset(shards=str(tmp_path))  # from the index this time
    assert (tmp_path / ".grr_index").is_dir()
    assert again.fingerprint == pairs.fingerprint
    parts = [webdataset(shards=str(tmp_path), split=s, validation_fraction=0.4) for s in ("train", "validation")]
    assert sorted([*parts[0].ids, *parts[1].ids]) == sorted(pairs.ids)
    assert all(len(part) for part in parts)


def test_the_validation_split_of_shards_is_the_fraction_asked_for_and_training_the_rest(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "JPEG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(400):
            for extension, data in (("jpg", image.getvalue()), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{i:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    shards = str(tmp_path / "a.tar")
    training, validation, more = (
        set(webdataset(shards=shards, split=split, validation_fraction=fraction).ids)
        for split, fraction in (("train", 0.1), ("validation", 0.1), ("validation", 0.3))
    )
    assert 20 < len(validation) < 65  # 40 expected, 6 their standard deviation
    assert len(training) == 400 - len(validation)
    assert not training & validation
    assert validation < more


def test_a_shard_without_text_uses_json_and_one_without_image_is_counted(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "JPEG")
    members = {"1.json": b'{"caption": "from json"}', "2.txt": b"no image", "1.jpg": image.getvalue()}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pairs = webdataset(shards=str(tmp_path / "a.tar"))
    assert list(pairs.captions) == ["from json"]
    assert pairs.skipped == 1


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("folder", {"path": "nowhere"}, "folder: there is no folder nowhere"),
    ("folder", {"path": "."}, "must hold one of captions.csv, .*write a captions.csv with the columns"),
    ("coco", {"annotations": "a.json", "images": "."}, "coco: there is no file of annotations a.json"),
    ("karpathy", {"annotations": "a.json", "images": ".", "split": "train"}, "there is no file of annotations a.json"),
    ("rocov2", {"path": ".", "split": "train"}, "there is no file train_captions.csv"),
    ("webdataset", {"shards": "*.tar"}, r"there is no file \*.tar; shards must be a file, a folder, a glob"),
])  # fmt: skip
def test_what_is_not_there_is_named(tmp_path, monkeypatch, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        DATASETS[name](**arguments)


@pytest.mark.parametrize(("text", "message"), [
    ("picture,words\na.png,x\n", r"must name the columns image and caption, got \['picture', 'words'\]"),
    ("image,caption\na.png,x, y\n", "has 3 columns, the header 2; put captions with commas between quotation marks"),
    ("image,caption\n", "the table in .* names no image; add a row for each caption"),
    ("image,caption,split\na.png,x,some\n", "split must be train, validation or test, got 'some'"),
])  # fmt: skip
def test_a_table_that_cannot_be_meant_is_refused(tmp_path, text, message):
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        folder(path=str(tmp_path), split="train")
