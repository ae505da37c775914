"""Every reader returns the pairs that the format's own libraries return, on real files where available."""

import csv
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
import unicodedata
import zipfile
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grr.data import DATASETS
from grr.data.formats.annotations import coco, karpathy
from grr.data.formats.shards import webdataset
from grr.data.formats.snli_ve import snli_ve
from grr.data.formats.tables import docci, folder, rocov2, urban1k
from grr.data.pairs import Texts


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


def test_coco_returns_each_caption_with_its_image(shared_data):
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
def test_karpathy_has_five_captions_an_image_in_each_split(shared_data, split, images):
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
    ("captions.csv", "image;caption\na.png;one, two\nb.png;three;\n"),
    ("captions.csv", 'image, caption\na.png, "one, two"\nb.png, three\n'),
    ("captions.csv", "filepath\tTitle\na.png\tone, two\nb.png\tthree\n"),
    ("results.csv", "image_name| comment_number| comment\na.png| 0| one, two\nb.png| 4   three\n"),
    ("metadata.csv", 'file_name,text\na.png,"one, two"\nb.png,three\n'),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "one, two"}\n{"file_name": "b.png", "text": "three"}\n'),
    ("captions.csv", "Image Name,source,Caption\r\n./a.png,x,\"one, two\"\r\n.\\\\b.png,y,three\r\n"),
    ("captions.tsv", 'image\tcaption\n"a.png"\t"one, two"\nb.png\tthree\n'.replace('"', "")),
    ("captions.csv", '\ufeffimage,caption,split\na.png,"one, two",train\nb.png,three,train\nc.png,no,val\n'),
])  # fmt: skip
def test_a_folder_with_a_table_of_any_kind(tmp_path, name, text):
    for image in "abc":
        picture(tmp_path / f"{image}.png")
    (tmp_path / name).write_text(text)
    pairs = folder(path=str(tmp_path), split="train" if "split" in text else None)
    assert list(pairs.captions) == ["one, two", "three"]
    assert list(pairs.ids) == ["a.png#0", "b.png#0"]


def test_adding_images_to_a_folder_moves_no_image_to_the_other_split(tmp_path):
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
    for source, name in (
        ("flickr30k_kaggle_style.head200.csv", "captions.csv"),
        ("flickr8k_kaggle_captions.head200.txt", "captions.txt"),
        ("flickr8k.token.head400.txt", "flickr8k.token.txt"),
    ):
        root = tmp_path / name
        root.mkdir()
        shutil.copy(shared_data / "formats" / source, root / name)
        first = (root / name).read_text().splitlines()[1]
        picture(root / "images" / first.split("#")[0].split(",")[0])
        pairs = folder(path=str(root), split=None)
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


def descriptions(folder: Path, suffix: str = "jsonlines") -> None:
    """The layout of DOCCI's descriptions: four of each split, of which train's images are missing."""
    names = [(split, k, f"{split}_{k:05d}") for split in ("train", "test", "qual_dev", "qual_test") for k in range(4)]
    rows = [
        {
            "example_id": name,
            "split": split,
            "image_file": f"{name}.jpg",
            "description": f"A long  view of {split} {k}.",
        }
        for split, k, name in names
    ]
    (folder / f"docci_descriptions.{suffix}").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", ["jsonlines", "jsonl"])
def test_docci_reads_the_descriptions_of_a_split(tmp_path, suffix):
    descriptions(tmp_path, suffix)
    for k in range(4):
        picture(tmp_path / f"images/test_{k:05d}.jpg")
    pairs = docci(path=str(tmp_path))
    assert list(pairs.captions) == [f"A long view of test {k}." for k in range(4)]
    assert pairs.ids[3] == "test_00003.jpg#0"
    assert pairs.load(3, size=8, crop="squash").shape == (3, 8, 8)
    assert (pairs.records.read, dict(pairs.records.left_out)) == (4, {"of another split": 12})
    picture(tmp_path / "images/qual_dev_00001.jpg")
    assert list(docci(path=str(tmp_path), split="qual_dev").captions)[1] == "A long view of qual_dev 1."
    with pytest.raises(ValueError, match="has no descriptions for split='validation'"):
        docci(path=str(tmp_path), split="validation")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"docci: the first 16 images of the table \(train_00000.jpg"):
        docci(path=str(tmp_path), split="train")


def test_urban1k_reads_the_first_line_of_each_caption(tmp_path):
    for name, text in (("10", "A busy  street.\nnot read"), ("9", "Two taxis.\n"), ("alone", "x"), ("empty", "")):
        (tmp_path / "caption").mkdir(exist_ok=True)
        (tmp_path / f"caption/{name}.txt").write_text(text)
    for name in ("9.jpg", "10.jpg", "silent.jpg", "empty.jpg"):
        picture(tmp_path / "image" / name)
    pairs = urban1k(path=str(tmp_path))
    assert list(zip(pairs.ids, pairs.captions, strict=True)) == [
        ("10.jpg#0", "A busy street."),
        ("9.jpg#0", "Two taxis."),
    ]
    assert pairs.load(0, size=8, crop="squash").shape == (3, 8, 8)
    reasons = ["caption without an image", "image without a caption", "empty caption"]
    assert dict(pairs.records.skipped) == dict.fromkeys(reasons, 1)
    assert pairs.records.total == 5
    (tmp_path / "caption/9.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"urban1k: \S+9.txt line 1 must be UTF-8"):
        urban1k(path=str(tmp_path))


def test_real_shards_have_the_members_that_tarfile_finds(shared_data, tmp_path):
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
    again = webdataset(shards=str(tmp_path))  # from the index
    assert (tmp_path / ".grr_index").is_dir()
    assert again.fingerprint == pairs.fingerprint
    parts = [webdataset(shards=str(tmp_path), split=s, validation_fraction=0.4) for s in ("train", "validation")]
    assert sorted([*parts[0].ids, *parts[1].ids]) == sorted(pairs.ids)
    assert all(len(part) for part in parts)


def test_the_validation_split_of_shards_is_validation_fraction_and_training_is_the_rest(tmp_path):
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
    assert 20 < len(validation) < 65  # the mean is 40, the standard deviation 6
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


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("folder", {"path": "nowhere"}, "folder: there is no folder nowhere"),
        ("folder", {"path": "."}, "must hold one of captions.csv, .*write a captions.csv with the columns"),
        ("coco", {"annotations": "a.json", "images": "."}, "coco: there is no annotations file a.json"),
        ("karpathy", {"annotations": "a.json", "images": ".", "split": "train"}, "there is no annotations file a"),
        ("rocov2", {"path": ".", "split": "train"}, "there is no file train_captions.csv"),
        ("docci", {"path": "."}, "there is no file docci_descriptions.jsonlines; path must be the folder that"),
        ("urban1k", {"path": "."}, "there is no folder image; path must hold image/ and caption/"),
        ("webdataset", {"shards": "*.tar"}, r"there is no file \*.tar; shards must be a file, a folder, a glob"),
    ],
)
def test_a_missing_path_is_named(tmp_path, monkeypatch, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        DATASETS[name](**arguments)


@pytest.mark.parametrize(("separator", "name"), [("\t", "tab"), (",", "comma"), (";", "semicolon"), ("|", "|")])
def test_the_separator_that_was_found_is_logged(tmp_path, caplog, separator, name):
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text(f"title{separator}filename\nx{separator}a.png\n")
    with caplog.at_level("INFO"):
        assert list(folder(path=str(tmp_path)).captions) == ["x"]
    assert f"separator {name}; images from the column filename, captions from title" in caplog.text


def test_a_list_of_captions_is_a_pair_for_each(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": ["one", "two"]}\n')
    pairs = folder(path=str(tmp_path))
    assert list(zip(pairs.ids, pairs.captions, strict=True)) == [("a.png#0", "one"), ("a.png#1", "two")]
    assert list(pairs.image_of) == [0, 0]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_different_spellings_of_a_name_are_one_image(tmp_path, form):
    name = "café.png"
    picture(tmp_path / "x" / unicodedata.normalize(form, name))
    folders = ("x/", "./x/", "x//", "x\\", "x/y/../")
    spellings = [unicodedata.normalize(form, f"{folder}{name}") for form in ("NFC", "NFD") for folder in folders]
    rows = "".join(f"{s},fox {i}\n" for i, s in enumerate(spellings))
    (tmp_path / "captions.csv").write_text("image,caption\n" + rows)
    pairs = folder(path=str(tmp_path))
    assert len(pairs) == 10
    assert set(pairs.image_of) == {0}
    assert pairs.load(9, size=4, crop="squash").shape == (3, 4, 4)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing", "long"])
def test_a_name_that_is_not_a_regular_file_is_a_bad_sample_without_waiting(tmp_path, kind):
    picture(tmp_path / "a.png")
    name = {"device": "/dev/zero", "long": "n" * 5000}.get(kind, kind)
    if kind == "pipe":
        os.mkfifo(tmp_path / "pipe")
    elif kind == "folder":
        (tmp_path / "folder").mkdir()
    (tmp_path / "captions.csv").write_text(f"image,caption\n{name},x\na.png,y\n")
    pairs = folder(path=str(tmp_path))
    assert list(pairs.captions) == ["x", "y"]
    started = Thread(target=lambda: errors.append(raised(OSError, pairs.load, 0, size=4, crop="squash")), daemon=True)
    errors: list[str] = []
    started.start()
    started.join(timeout=30)
    assert not started.is_alive()
    assert len(errors) == 1
    if kind in ("pipe", "device", "folder"):
        assert f"must be a regular file, but is a {kind}" in errors[0]


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_a_table_that_is_a_pipe_is_refused_without_waiting(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="must be a regular file, but is a pipe"):
        folder(path=str(tmp_path))


def test_annotations_shards_and_entailment_that_are_pipes_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    file = str(tmp_path / "a.tar")
    for open_it in (
        lambda: coco(annotations=file, images=str(tmp_path)),
        lambda: snli_ve(path=file, images=str(tmp_path)),
        lambda: webdataset(shards=str(tmp_path)),
    ):
        with pytest.raises(OSError, match="must be a regular file, but is a pipe"):
            open_it()


def raised(kind: type[Exception], call, *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    return str(caught.value)


HEADER = b"image,caption\na.png,one\n"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("captions.csv", HEADER + "a.png,café\n".encode("latin-1"),
     r"line 3 must be UTF-8 text, got the byte 0xe9 in column 10; save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8"),
    ("captions.jsonl", b'{"image": "a.png", "caption": "caf\xe9"}\n', "line 1 must be UTF-8 text, got the byte 0xe9"),
    ("captions.csv", HEADER.decode().encode("utf-16"), "must be UTF-8 text, got UTF-16; save it .*iconv -f UTF-16 "),
    ("captions.csv", HEADER.decode().encode("utf-16-le"), "line 1 must be text, got a NUL character; .* UTF-16"),
    ("captions.csv", HEADER + b"x" * 2**21, "line 3 is longer than 1,048,576 characters; is the file a table"),
    ("captions.csv", HEADER + b"a.png\n", r"line 3 has 1 field and the header 2 \(separator: comma\)"),
    ("captions.tsv", b"image\tcaption\na.png\tx\ty\n", r"line 2 has 3 fields .*; remove the tab from the caption"),
    ("captions.csv", HEADER + b'a.png,"open\na.png,two\n', r"line 3 must close each quotation mark"),
    ("captions.csv", HEADER + b'a.png,"open\nb.png,two\nc.png,12 inches "\n',
     r"line 3 opens a quotation mark that line 5 closes, and between them 'b.png,two' looks like a row"),
    ("captions.csv", HEADER + b'a.png,"say" so\n', "line 3 must close each quotation mark"),
    ("captions.csv", b'caption,image\none,a.png\n"open,a.png\n12 inches ",b.png\n', "line 3 opens a quotation mark"),
    ("captions.tsv", b'image\tcaption\na.png\t"one\ntwo\nb.png\tx\n', "line 2 must close each quotation mark"),
    ("captions.tsv", b'image\tcaption\na.png\tone\na.png\t"\n\t"\n', "line 3 must close each quotation mark"),
    ("captions.csv", b"image,caption,caption\na.png,x,y\n", "line 1 must name the column caption once"),
    ("captions.tsv", b"url\tcaption\nhttp://x/a.png\tx\n", "line 1 must name image files, got .*data.name=webdataset"),
    ("captions.tsv", b"a fox\thttp://x/a.png\n", "line 1 must name image files, got .* with img2dataset"),
    ("captions.txt", b"a.png#0\tone\nb.png two\n", "line 2 must be a name, #, a number, a tab and a caption"),
    ("captions.jsonl", b"[" * 100_000 + b"\n", "line 1 must be one JSON object"),
    ("captions.jsonl", b'[{"image": "a.png", "caption": "x"}]\n', "line 1 must be one JSON object"),
    ("captions.jsonl", b'{"image": 7, "caption": "x"}\n', "line 1: image must be a string, got 7"),
    ("captions.jsonl", b'{"image": "a.png", "caption": "\\ud800"}\n', "line 1: a caption must be text, got half of a"),
    ("captions.csv", b"image,caption,split\na.png,x,train\na.png,y,\n", "line 3: split must be train, validation or"),
])  # fmt: skip
def test_a_table_that_cannot_be_parsed_is_refused_with_its_line_and_a_remedy(tmp_path, name, content, message):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^folder: .*{name} {message}") as caught:
        folder(path=str(tmp_path), split="train" if b"split" in content else None)
    assert ";" in str(caught.value)


def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path):
    picture(tmp_path / "a.png")
    for name, text in (
        ("captions.csv", "image,caption\na.png,x\n"),
        ("captions.txt", "a.png#0\tx\n"),
        ("captions.jsonl", '{"image": "a.png", "caption": "x"}\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert list(folder(path=str(tmp_path)).ids) == ["a.png#0"]
        (tmp_path / name).unlink()


def test_real_tables_of_urls_and_real_results_are_refused_with_what_was_found(shared_data, tmp_path):
    for name, message in (
        ("cc12m_like_with_header.tsv", r"got the columns \['url', 'caption'\]"),
        ("cc3m_validation.head200.tsv", "must name image files"),
        ("roco_v1_test_captions.head200.tsv", "must name the columns image and caption, got"),
    ):
        shutil.copy(shared_data / "formats" / name, tmp_path / "captions.tsv")
        with pytest.raises(ValueError, match=message):
            folder(path=str(tmp_path))
    results = shared_data / "formats/captions_val2014_fakecap_results.json"
    with pytest.raises(ValueError, match="must hold an object with images and annotations"):
        coco(annotations=str(results), images=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,words\na.png,x\n", r"must name the columns image and caption, got \['picture', 'words'\]"),
        ("image,caption\na.png,x, y\n", r"line 2 has 3 fields and the header 2 \(separator: comma\); put captions"),
        ("image,caption\n", "the table in .* has no image names; add a row for each caption"),
        ("image,caption,split\na.png,x,some\n", "split must be train, validation or test, got 'some'"),
    ],
)
def test_an_implausible_table_is_refused(tmp_path, text, message):
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        folder(path=str(tmp_path), split="train")


# The index of a shard


@pytest.fixture
def shard(tmp_path) -> Path:
    """A folder with a shard of three samples."""
    (tmp_path / "shards").mkdir()
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "JPEG")
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        for key in range(3):
            for name, data in ((f"{key}.jpg", image.getvalue()), (f"{key}.txt", f"text {key}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return tmp_path / "shards"


@pytest.mark.parametrize("kind", ["a file", "a link", "a link to nothing"])
def test_an_index_that_cannot_be_written_beside_its_shard_is_kept_in_memory_only(
    shard, tmp_path, monkeypatch, caplog, kind
):
    (tmp_path / "victim").mkdir()
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / f"grr_index_{os.getuid()}").symlink_to(tmp_path / "victim")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    index = shard / ".grr_index"
    if kind == "a file":
        index.touch()
    else:
        index.symlink_to(tmp_path / ("victim" if kind == "a link" else "none"))
    assert list(webdataset(shards=str(shard)).captions) == ["text 0", "text 1", "text 2"]
    assert "is kept in memory and rebuilt by each run" in caplog.text
    assert "set data.cache to a folder" in caplog.text
    assert list((tmp_path / "victim").iterdir()) == []
    assert not (tmp_path / "none").exists()
    assert [p.name for p in (tmp_path / "temporary").iterdir()] == [f"grr_index_{os.getuid()}"]
    caplog.clear()
    assert len(webdataset(shards=str(shard), cache=str(tmp_path / "own"))) == 3
    assert caplog.text == ""
    assert len(list((tmp_path / "own").rglob("0.tar.npz"))) == 1


def changed(index: dict[str, np.ndarray], fault: str) -> None:
    """Damage an index so that numpy can still read it."""
    if fault == "outside":
        index["offsets"] = index["offsets"] + 10**12
    elif fault == "negative":
        index["sizes"] = -index["sizes"]
    elif fault == "too few":
        index["sizes"] = index["sizes"][:1]
    elif fault == "missing":
        del index["captions"]
    elif fault == "floats":
        index["offsets"] = index["offsets"].astype(float)
    elif fault == "texts":
        index["captions_ends"] = index["captions_ends"][::-1].copy()
    elif fault == "not text":
        index["captions"] = np.full_like(index["captions"], 0xFF)
    elif fault == "images":
        index["image_of"] = index["image_of"] * 7
    elif fault == "counts":
        index["records"] = index["records"][:-3]


CHANGES = ["outside", "negative", "too few", "missing", "floats", "texts", "not text", "images", "counts"]


@pytest.mark.parametrize("fault", [*CHANGES, "noise", "compressed", "a pipe", "empty"])
def test_an_index_that_does_not_fit_its_shard_is_rebuilt(shard, fault):
    pairs = webdataset(shards=str(shard))
    file = shard / ".grr_index/0.tar.npz"
    whole = file.read_bytes()
    index = dict(np.load(file))
    for joined in (shard / ".grr_index").glob("*.joined"):
        joined.unlink()
    if fault == "a pipe":
        file.unlink()
        os.mkfifo(file)
    elif fault in ("noise", "empty"):
        file.write_bytes(b"noise" * (fault == "noise"))
    elif fault == "compressed":
        np.savez_compressed(file, **index)
    else:
        changed(index, fault)
        np.savez(file, **index)
    again = webdataset(shards=str(shard))
    assert again.fingerprint == pairs.fingerprint
    assert again.records.facts() == pairs.records.facts()
    assert [again.place(i) for i in range(3)] == [pairs.place(i) for i in range(3)]
    assert again.image_of.tolist() == pairs.image_of.tolist() == [0, 1, 2]
    with zipfile.ZipFile(file) as packed:
        assert {part.compress_type for part in packed.infolist()} == {zipfile.ZIP_STORED}
    assert np.load(file)["offsets"].tolist() == np.load(io.BytesIO(whole))["offsets"].tolist()


def test_temporary_files_of_killed_processes_are_removed_and_those_of_running_ones_kept(shard):
    folder_of_index = shard / ".grr_index"
    folder_of_index.mkdir()
    for name, age in (("0.tar.npz.abcdefgh.tmp", 7200), ("tmpabcdefgh", 7200), ("1.tar.npz.abcdefgh.tmp", 60)):
        (folder_of_index / name).touch()
        os.utime(folder_of_index / name, (time.time() - age,) * 2)
    webdataset(shards=str(shard))
    names = sorted(p.name for p in folder_of_index.iterdir() if p.suffix != ".joined")
    assert names == ["0.tar.npz", "1.tar.npz.abcdefgh.tmp"]


def test_an_index_that_cannot_be_written_whole_leaves_nothing_behind(shard, monkeypatch, caplog):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert len(webdataset(shards=str(shard))) == 3
    assert "No space left on device" in caplog.text
    assert list((shard / ".grr_index").iterdir()) == []


def test_shards_in_folders_below_are_found_by_two_stars(shard):
    for name in ("a", "a/b"):
        (shard / name).mkdir()
        shutil.copy(shard / "0.tar", shard / name / f"{name[-1]}.tar")
    assert len(webdataset(shards=str(shard / "**/*.tar"))) == 9
    assert len(webdataset(shards=str(shard / "*.tar"))) == 3


def test_a_range_of_too_many_shards_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at most 1,000,000 shards, got \{0\.\.99999999999\}; correct the range"):
        webdataset(shards=str(tmp_path / "{0..99999999999}.tar"))


def test_an_image_in_a_shard_that_would_fill_the_memory_is_skipped(shard):
    whole = (shard / "0.tar").read_bytes()
    large = tarfile.TarInfo("9.jpg")
    large.size = 2**31
    text = tarfile.TarInfo("9.txt")
    with (shard / "0.tar").open("wb") as file:  # the content of the image is a hole in the file
        file.write(large.tobuf())
        file.seek(large.size, os.SEEK_CUR)
        file.write(text.tobuf() + whole)
    pairs = webdataset(shards=str(shard))
    assert list(pairs.captions) == ["text 0", "text 1", "text 2"]
    assert pairs.records.skipped == {"image of more than 536,870,912 bytes": 1}


def test_shards_whose_samples_are_all_of_the_other_split_are_not_called_empty(shard):
    with pytest.raises(
        ValueError, match=r"got 3 samples and none of them with validation_fraction=1e-09; set a larger"
    ):
        webdataset(shards=str(shard), split="validation", validation_fraction=1e-9)


def test_a_name_with_control_characters_is_printed_as_escapes(tmp_path, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("\x1b[2Jevil.jpg", "a.jpg", "a.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match="hold no samples"):
        webdataset(shards=str(tmp_path))
    assert r"image without a caption: '0/\x1b[2Jevil'" in caplog.text
    assert "\x1b" not in caplog.text


ODD_SAMPLES = [
    ({"a.jpg": b"", "a.png": b"", "a.txt": b"x"}, {"more than one image": 1}),
    ({"a.input.jpg": b"", "a.txt": b"x"}, {"image without a caption": 1, "caption without an image": 1}),
    ({"a.jpg": b"", "a.txt": b"caf\xe9"}, {"caption that is not UTF-8": 1}),
    ({"a.jpg": b"", "a.txt": " x".encode("utf-16")}, {"caption that is not UTF-8": 1}),
    ({"a.jpg": b"", "a.txt": b" \n"}, {"empty caption": 1}),
    ({"a.jpg": b"", "a.json": b'{"caption": null}'}, {"caption that is not text": 1}),
    ({"a.jpg": b"", "a.json": b'{"caption": NaN}'}, {"caption that is not text": 1}),
    ({"a.jpg": b"", "a.json": b'{"caption": {"en": "x"}}'}, {"caption that is not text": 1}),
    ({"a.jpg": b"", "a.json": b'{"caption": "\\ud800"}'}, {"caption that is not text": 1}),
    ({"a.jpg": b"", "a.json": b"7"}, {"caption that is not text": 1}),
    ({"a.jpg": b"", "a.json": b"{"}, {"JSON that cannot be read": 1}),
    ({"a.jpg": b"", "a.json": b"[" * 100_000}, {"JSON that cannot be read": 1}),
    ({"._a.jpg": b"", "._a.txt": b"x"}, {}),
]


@pytest.mark.parametrize(("members", "skipped"), ODD_SAMPLES, ids=lambda value: " ".join(value))
def test_a_sample_that_cannot_be_used_is_counted_and_the_others_are_read(tmp_path, members, skipped):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (members | {"v1.0_b.webp": b"", "v1.0_b.caption": b"good"}).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pairs = webdataset(shards=str(tmp_path))
    assert list(pairs.ids) == ["0/v1.0_b"]
    assert list(pairs.captions) == ["good"]
    assert pairs.records.skipped == skipped
    assert pairs.skipped == sum(skipped.values())
