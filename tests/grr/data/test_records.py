"""Law of every reader, for any content: pairs read + records skipped + records left out = records in the files."""

import csv
import io
import json
import math
import re
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from grr.data import DATASETS, LABELLED, InMemory, Labelled, Pairs
from grr.data.formats.annotations import coco, karpathy
from grr.data.formats.image_folder import image_folder
from grr.data.formats.shards import webdataset
from grr.data.formats.snli_ve import snli_ve
from grr.data.formats.tables import docci, folder, rocov2, urban1k
from grr.data.formats.vqa_v2 import vqa_v2
from grr.data.records import NAMED, Records, file_name

LETTERS = st.characters(exclude_categories=["Cs", "Cc"])
CAPTION = st.text(LETTERS, max_size=12)
QUOTES = st.text(st.sampled_from('ab", '), max_size=8)  # where tables go wrong
IMAGE = st.sampled_from(["a.png", "b.png", "c.png", ""])
JSON_ODD = [None, math.nan, 3, 2.5, True, {"raw": "x"}, [1], ["x", None], [["x"]]]
JSON_CAPTION = st.one_of(CAPTION, st.lists(CAPTION, max_size=3), st.sampled_from(JSON_ODD))
SPLIT = st.sampled_from(["train", "val", "test"])
TESTED = {"folder", "coco", "karpathy", "rocov2", "webdataset", "image_folder", "vqa_v2", "snli_ve"}
TESTED |= {"docci", "urban1k"}
many = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder with images, to which each example writes its table."""
    root = tmp_path_factory.mktemp("photos")
    for name in ("a.png", "b.png", "c.png", "1.png", "a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (4, 4)).save(root / name)
    return root


def table(root: Path, name: str, text: str) -> Path:
    for old in (*root.glob("captions.*"), *root.glob("metadata.*")):
        old.unlink()
    (root / name).write_text(text, encoding="utf-8", newline="")
    return root / name


def balanced(records: Records, total: int) -> None:
    assert records.read + records.skipped.total() + records.left_out.total() == records.total == total
    for reason, count in records.skipped.items():
        assert 1 <= len(records.names[reason]) <= min(count, NAMED)


def read_or_refused(root: Path) -> Pairs | None:
    """Returns the pairs of the table, or None if an error names one of its lines."""
    try:
        return folder(path=str(root))
    except ValueError as error:
        refusal = str(error)
    assert re.search(r"captions\.\w+ line \d+ ", refusal)
    return None


def test_every_reader_of_files_has_a_law_here():
    generated = {name for name in (*DATASETS, *LABELLED) if name.startswith("openmoji")}
    assert {*DATASETS, *LABELLED} - generated == TESTED


# Tables


@many
@given(
    rows=st.lists(st.tuples(IMAGE, st.text(st.one_of(LETTERS, st.sampled_from('\n",;\t|')), max_size=12), SPLIT)),
    separator=st.sampled_from(",;"),
    split=st.sampled_from([None, "train", "test"]),
)
def test_a_quoted_table_of_any_captions_is_read_as_it_was_written(photos, rows, separator, split):
    rows = [("a.png", "first", "train"), ("a.png", "first", "test"), *rows]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([("image", "caption", "split"), *rows])
    table(photos, "captions.csv", text.getvalue())
    pairs = folder(path=str(photos), split=split)
    wanted = [(i, one_line(c)) for i, c, s in rows if split in (None, s) and i and c.split()]
    read = [(pairs.images[j], c) for j, c in zip(pairs.image_of, pairs.captions, strict=True)]
    assert read == wanted
    balanced(pairs.records, len(rows))


@many
@given(rows=st.lists(st.tuples(IMAGE, st.one_of(CAPTION, QUOTES)), max_size=8), separator=st.sampled_from("\t|"))
def test_a_table_without_quoting_keeps_every_row_and_every_quotation_mark(photos, rows, separator):
    rows = [("a.png", "first"), *((i, c.replace("|", "")) for i, c in rows)]
    table(photos, "captions.tsv", "".join(f"{i}{separator}{c}\n" for i, c in [("image", "caption"), *rows]))
    if all(i for i, _ in rows) or not any('"' in c for _, c in rows):
        pairs = folder(path=str(photos))
    else:  # a line without an image name may continue the caption before it
        pairs = read_or_refused(photos)
        if pairs is None:
            return
    letters = [c for c in pairs.captions if c.replace('"', "").split()]  # "" alone is a quoted empty caption
    wanted = [one_line(c) for i, c in rows if i and c.replace('"', "").split()]
    assert [c.replace('"', "") for c in letters] == [c.replace('"', "") for c in wanted]
    changed = [c for c, w in zip(letters, wanted, strict=True) if c != w]
    assert all(f'"{c.replace(chr(34), chr(34) * 2)}"' in wanted for c in changed)  # quoted, quotation marks doubled
    balanced(pairs.records, len(rows))


@many
@given(rows=st.lists(st.text(st.sampled_from('ab"\n\t '), max_size=8), max_size=6))
def test_a_quoted_table_with_tabs_is_read_or_its_line_is_named(photos, rows):
    rows = [("a.png", "first"), *(("b.png", f"x{c}") for c in rows)]
    text = io.StringIO()
    csv.writer(text, delimiter="\t").writerows([("image", "caption"), *rows])
    table(photos, "captions.tsv", text.getvalue())
    pairs = read_or_refused(photos)
    if pairs is None:
        return
    assert list(pairs.captions) == [one_line(c) for _, c in rows]
    balanced(pairs.records, len(rows))


@many
@given(
    captions=st.lists(QUOTES.map(lambda text: text.replace(",", "")), max_size=8),
    first=st.booleans(),
    separator=st.sampled_from(",;|\t"),
)
def test_a_quotation_mark_hides_no_row_of_an_unquoted_table(photos, captions, first, separator):
    rows = [("a.png", "first"), *(("b.png", f"{c}x") for c in captions)]
    order = (lambda i, c: (i, c)) if first else (lambda i, c: (c, i))
    lines = [separator.join(order(*row)) for row in [("image", "caption"), *rows]]
    table(photos, "captions.csv", "\n".join(lines))
    pairs = read_or_refused(photos)
    if pairs is None:
        return
    balanced(pairs.records, len(rows))


@many
@given(rows=st.lists(st.tuples(IMAGE, JSON_CAPTION)), key=st.sampled_from(["text", "caption"]))
def test_a_caption_in_json_is_text_or_a_list_of_texts_or_an_error_that_names_the_line(photos, rows, key):
    rows = [("a.png", ["one", "two"]), *rows]
    table(photos, "metadata.jsonl", "".join(json.dumps({"file_name": i, key: c}) + "\n" for i, c in rows))
    captions = [c if isinstance(c, list) else [c] for _, c in rows]
    wrong = [n for n, own in enumerate(captions, 1) if not all(isinstance(c, str) for c in own)]
    if wrong:
        with pytest.raises(ValueError, match=f"metadata.jsonl line {wrong[0]}: a caption must be a string or a list"):
            folder(path=str(photos))
        return
    pairs = folder(path=str(photos))
    assert list(pairs.captions) == [
        one_line(c) for (i, _), own in zip(rows, captions, strict=True) if i for c in own if c.split()
    ]
    balanced(pairs.records, sum(max(1, len(own)) if i else 1 for (i, _), own in zip(rows, captions, strict=True)))


@many
@given(rows=st.lists(st.tuples(st.sampled_from(["a", "b", ""]), CAPTION), max_size=8))
def test_rocov2_counts_every_row(photos, rows):
    rows = [("a", "first"), *rows]
    text = io.StringIO()
    csv.writer(text).writerows([("ID", "Caption"), *rows])
    (photos / "valid_captions.csv").write_text(text.getvalue(), newline="")
    (photos / "valid").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(photos / "valid/a.jpg")
    pairs = rocov2(path=str(photos), split="validation")
    assert list(pairs.captions) == [one_line(c) for i, c in rows if i and c.split()]
    balanced(pairs.records, len(rows))


@many
@given(rows=st.lists(st.tuples(st.sampled_from(["a.png#0", "b.png#12"]), CAPTION.filter(lambda c: "#" not in c))))
def test_flickr_token_files_count_every_line(photos, rows):
    rows = [("a.png#0", "first"), *rows]
    table(photos, "captions.txt", "".join(f"{i}\t{c}\n" for i, c in rows))
    pairs = folder(path=str(photos))
    assert list(pairs.captions) == [one_line(c) for _, c in rows if c.split()]
    balanced(pairs.records, len(rows))


@many
@given(rows=st.lists(st.tuples(IMAGE, CAPTION, st.sampled_from(["train", "test", "qual_dev"])), max_size=8))
def test_docci_counts_every_line(photos, rows):
    rows = [("a.png", "first", "test"), *rows]
    lines = [{"image_file": i, "description": c, "split": s, "example_id": "x"} for i, c, s in rows]
    (photos / "docci_descriptions.jsonlines").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = docci(path=str(photos))
    assert list(pairs.captions) == [one_line(c) for i, c, s in rows if s == "test" and i and c.split()]
    balanced(pairs.records, len(rows))


@many
@given(captions=st.dictionaries(st.sampled_from("abcdxy"), CAPTION))
def test_urban1k_counts_every_caption_and_every_image_without_one(tmp_path_factory, captions):
    captions = {"c": "first", **captions}
    root = tmp_path_factory.mktemp("urban")
    for folder_name in ("image", "caption"):
        (root / folder_name).mkdir()
    for name in "abc":
        (root / f"image/{name}.jpg").touch()
    for name, caption in captions.items():
        (root / f"caption/{name}.txt").write_text(f"{caption}\nmore", encoding="utf-8")
    pairs = urban1k(path=str(root))
    assert list(pairs.captions) == [one_line(c) for name, c in sorted(captions.items()) if name in "abc" and c.split()]
    balanced(pairs.records, len(captions.keys() | set("abc")))


# JSON files


@many
@given(annotations=st.lists(st.tuples(st.integers(0, 5), CAPTION), max_size=8))
def test_coco_counts_annotations_without_an_image_and_images_without_an_annotation(photos, annotations):
    annotations = [(1, "first"), *annotations]
    images = [{"id": j, "file_name": f"{name}.png"} for j, name in ((1, "a"), (2, "b"), (3, "c"))]
    content = {"images": images, "annotations": [{"image_id": j, "caption": c} for j, c in annotations]}
    (photos / "coco.json").write_text(json.dumps(content))
    pairs = coco(annotations=str(photos / "coco.json"), images=str(photos))
    assert list(pairs.captions) == [one_line(c) for j, c in annotations if j in (1, 2, 3) and c.split()]
    without_caption = {1, 2, 3} - {j for j, _ in annotations}
    assert pairs.records.skipped["image without a caption"] == len(without_caption)
    balanced(pairs.records, len(annotations) + len(without_caption))


@pytest.mark.parametrize("caption", [None, math.nan, 7, {"raw": "x"}, ["x", 1]])
def test_coco_names_the_annotation_whose_caption_is_not_text(photos, caption):
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}] * 2}
    content["annotations"].append({"image_id": 1, "caption": caption})
    (photos / "coco.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"coco.json annotations\[2\]: a caption must be a string or a list"):
        coco(annotations=str(photos / "coco.json"), images=str(photos))


def test_coco_with_one_id_for_two_images_is_refused(photos):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]
    (photos / "coco.json").write_text(json.dumps({"images": images, "annotations": []}))
    with pytest.raises(ValueError, match=r"images\[1\] must have a unique id, got 1, which 'a.png' has too"):
        coco(annotations=str(photos / "coco.json"), images=str(photos))


@many
@given(images=st.lists(st.tuples(IMAGE, SPLIT, st.lists(CAPTION, max_size=3)), max_size=6))
def test_karpathy_counts_every_sentence(photos, images):
    images = [("a.png", "train", ["first"]), *images]
    content = [{"filename": i, "split": s, "sentences": [{"raw": c} for c in own]} for i, s, own in images]
    (photos / "karpathy.json").write_text(json.dumps({"images": content}))
    pairs = karpathy(annotations=str(photos / "karpathy.json"), images=str(photos), split="train")
    assert list(pairs.captions) == [one_line(c) for i, s, own in images if i and s == "train" for c in own if c.split()]
    balanced(pairs.records, sum(max(1, len(own)) if i else 1 for i, _, own in images))


@pytest.mark.parametrize("raw", [None, 3, ["x"], {"a": 1}])
def test_karpathy_names_the_sentence_that_is_not_text(photos, raw):
    content = [{"filename": "a.png", "split": "train", "sentences": [{"raw": "x"}, {"raw": raw}]}]
    (photos / "karpathy.json").write_text(json.dumps({"images": content}))
    with pytest.raises(ValueError, match=r"karpathy.json images\[0\].sentences\[1\] must have raw, a string"):
        karpathy(annotations=str(photos / "karpathy.json"), images=str(photos), split="train")


@many
@given(
    questions=st.lists(st.tuples(CAPTION, st.sampled_from(["yes", "no", "rare"])), max_size=8), more=st.integers(0, 3)
)
def test_vqa_counts_every_question_and_answers_without_a_question(photos, questions, more):
    questions = [("is it", "yes"), ("is it", "yes"), ("is it", "no"), *questions]
    Image.new("RGB", (4, 4)).save(photos / "COCO_val2014_000000000001.jpg")
    asked = [{"question_id": j, "image_id": 1, "question": q} for j, (q, _) in enumerate(questions)]
    answers = [a for _, a in questions] + ["yes"] * more
    answered = [{"question_id": j, "multiple_choice_answer": a} for j, a in enumerate(answers)]
    (photos / "q.json").write_text(json.dumps({"questions": asked, "data_subtype": "val2014"}))
    (photos / "a.json").write_text(json.dumps({"annotations": answered}))
    files = {"questions": str(photos / "q.json"), "annotations": str(photos / "a.json"), "images": str(photos)}
    data = vqa_v2(**files, answers=2)
    kept = [(one_line(q), a) for q, a in questions if a in data.classes and q.split()]
    assert [(c, data.classes[label]) for c, label in zip(data.captions, data.labels, strict=True)] == kept
    balanced(data.records, len(questions) + more)
    assert InMemory(data).records is data.records


@many
@given(rows=st.lists(st.tuples(CAPTION, st.sampled_from(["-", "neutral", "entailment"])), max_size=8))
def test_snli_ve_counts_every_line_and_labels_stay_with_their_texts(photos, rows):
    rows = [("first", "neutral"), *rows]
    lines = [{"Flickr30K_ID": "a", "sentence2": c, "gold_label": g} for c, g in rows]
    (photos / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = snli_ve(path=str(photos / "dev.jsonl"), images=str(photos))
    kept = [(one_line(c), g) for c, g in rows if g != "-" and c.split()]
    assert [(c, data.classes[label]) for c, label in zip(data.captions, data.labels, strict=True)] == kept
    balanced(data.records, len(rows))


@given(files=st.sets(st.sampled_from(["x.png", "y.JPG", "z.txt", "notes", "w.webp"]), min_size=1))
def test_a_folder_of_classes_counts_every_file(tmp_path_factory, files):
    assume(any(file.lower().endswith(("png", "jpg", "webp")) for file in files))
    root = tmp_path_factory.mktemp("classes")
    (root / "cat").mkdir()
    for file in files:
        (root / "cat" / file).touch()
    data = image_folder(path=str(root))
    assert isinstance(data, Labelled)
    assert len(data) == len(files - {"z.txt", "notes"})
    balanced(data.records, len(files))


# Shards

GOOD_IMAGE, GOOD_TEXT = b"an image", b"a caption"
KEYS = st.sampled_from(["0", "v1.0_a", "22.05", "dir/1", "./dir/2", "é"])
MEMBERS = st.tuples(
    KEYS,
    st.sampled_from(["jpg", "JPEG", "png", "webp", "txt", "caption", "text", "json", "cls"]),
    st.sampled_from(
        [
            GOOD_TEXT,
            b"",
            b" \n",
            b"\xff\xfe",
            b"caf\xe9",
            b'{"caption": ["x", "y"]}',
            b'{"caption": null}',
            b'{"caption": NaN}',
            b"[" * 100_000,
            b"7",
        ]
    ),
    st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]),
)


def write_shard(file: Path, members: list[tuple[str, str, bytes, bytes]], form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(file, "w", format=form) as tar:
        for key, extension, content, kind in members:
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.type, info.linkname = kind, "elsewhere"
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)


@many
@given(
    members=st.lists(MEMBERS, max_size=14),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_shards_of_any_members_count_every_key_once_for_each_time_it_occurs(tmp_path_factory, members, form):
    root = tmp_path_factory.mktemp("shards")
    members = [("good", "jpg", GOOD_IMAGE, tarfile.REGTYPE), ("good", "txt", GOOD_TEXT, tarfile.REGTYPE), *members]
    write_shard(root / "0.tar", members, form)
    pairs = webdataset(shards=str(root))
    endings: dict[str, list[str]] = {}
    for key, extension, _, _ in members:
        if extension != "cls":
            endings.setdefault(file_name(key), []).append(extension.lower())
    odd = sum(kind != tarfile.REGTYPE for _, extension, _, kind in members if extension == "cls")
    extra = sum(str(name).endswith("#1") for name in pairs.ids)  # the second caption of a sample
    keys = sum(max(map(own.count, own)) for own in endings.values())
    others = sum(extension == "cls" and kind == tarfile.REGTYPE for _, extension, _, kind in members)
    balanced(pairs.records, keys + odd + extra + others)
    contents = {(file_name(k), e.lower()): c for k, e, c, _ in members}
    for i, name in enumerate(pairs.ids):
        key = name.removeprefix("0/").removesuffix("#1")
        own = {e: contents[key, e] for e in endings[key]}
        kind = next(e for e in ("txt", "caption", "text", "json") if e in own)
        texts = json.loads(own[kind])["caption"] if kind == "json" else own[kind].decode()
        assert pairs.captions[i] in (texts if isinstance(texts, list) else [one_line(texts)])
        assert pairs.content(i) == own[next(e for e in own if e in ("jpg", "jpeg", "png", "webp"))]
    again = webdataset(shards=str(root))
    assert (root / ".grr_index/0.tar.npz").is_file()
    assert again.records.facts() == pairs.records.facts()
    assert again.fingerprint == pairs.fingerprint


def test_parts_of_a_split_are_all_records_of_the_shards(tmp_path):
    content = b'{"caption": ["x", "y"]}'
    members = [(str(k), e, content, tarfile.REGTYPE) for k in range(40) for e in ("jpg", "json")]
    write_shard(tmp_path / "0.tar", members)
    parts = [webdataset(shards=str(tmp_path), split=s, validation_fraction=0.3) for s in ("train", "validation")]
    for part in parts:
        balanced(part.records, 80)
        assert part.records.read == len(part)
        images = [name.removesuffix("#1") for name in part.ids]
        assert all(images.count(name) == 2 for name in images)  # both captions of an image are in one part
        assert len(set(part.image_of)) == len(part) // 2
    assert len(parts[0]) + len(parts[1]) == 80
