"""What is said of data is what plain counting gives; and what is wrong with them is named."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grr.data import Labelled
from grr.data.look import (
    CAPTIONS,
    Data,
    Finding,
    amounts,
    lengths,
    pictures,
    shared,
    some,
    texts,
    without_captions,
)
from grr.data.pairs import image_files
from grr.packing import IGNORE
from grr.tokenizer import load_tokenizer, train_tokenizer

ROWS = st.lists(
    st.tuples(st.sampled_from(["a.png", "b.png", "c.png", "d.png"]), st.sampled_from(["", "fox", "owl", "key"])),
    min_size=1, max_size=12,
)  # fmt: skip


def data(rows, name="data", root="photos") -> Data:
    return Data(name, image_files(Path(root), rows))


def number(findings, what: str) -> int:
    """The first number of a finding; 0 without one."""
    said = [finding.said for finding in findings if finding.what == what]
    return int(re.search(r"[\d,]+", said[0])[0].replace(",", "")) if said else 0


@given(rows=ROWS)
def test_counts_are_those_of_plain_counting(rows):
    findings = [*amounts(data(rows)), *texts(data(rows))]
    images_of = {caption: {image for image, c in rows if c == caption} for _, caption in rows if caption}
    assert number(findings, "pairs") == len(rows)
    assert f"of {len({image for image, _ in rows})} images" in findings[0].said
    assert number(findings, "empty") == sum(caption == "" for _, caption in rows)
    assert number(findings, "duplicates") == len(rows) - len(set(rows))
    assert number(findings, "alike") == sum(len(images) > 1 for images in images_of.values())
    assert [finding.what for finding in findings if finding.wrong] == ["empty"] * any(c == "" for _, c in rows)


@given(ours=ROWS, theirs=ROWS, elsewhere=st.booleans())
def test_two_parts_share_the_images_that_are_the_same_files_and_captions_that_are_the_same_words(
    ours, theirs, elsewhere
):
    held_out, train = data(ours, "validation"), data(theirs, "data", "others" if elsewhere else "photos")
    findings = list(shared(held_out, train, 0, every=False))
    both = set() if elsewhere else {image for image, _ in ours} & {image for image, _ in theirs}
    assert findings[0].wrong == bool(both)
    if both:
        assert number(findings, "shared") == len(both)
    assert number(findings, "said before") == sum(caption in {c for _, c in theirs} for _, caption in ours)


def test_images_of_equal_pixels_in_both_parts_are_a_fault():
    findings = list(shared(data([("a.png", "x")], "validation"), data([("b.png", "y")]), 1, every=True))
    assert [(finding.wrong, number([finding], "shared")) for finding in findings] == [(True, 1)]


def test_of_labelled_pairs_the_classes_are_told_and_questions_may_repeat():
    pairs = image_files(Path("photos"), [("a.png", "what"), ("b.png", "what"), ("c.png", "what")])
    labelled = Data("data", Labelled(pairs, ["fox", "owl"], np.array([0, 0, IGNORE])))
    said = {finding.what: finding for finding in (*amounts(labelled), *texts(labelled))}
    assert said["classes"].said == "2, of 0 to 2 pairs; 1 of 3 pairs in none"
    assert said["first"].said.endswith("'what' -> fox")
    assert "alike" not in said


@pytest.mark.parametrize("context", [5, 8, 16])
def test_tokens_are_those_of_sentencepiece_and_what_is_longer_than_the_room_is_cut(tmp_path, context):
    captions = ["fox", "a fox and an owl", "a fox and an owl and a key", "key " * 7, "owl " * 40]
    train_tokenizer(captions, tmp_path / "own.model", vocab_size=40)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "own.model"))
    counts = [len(plain.encode(caption.strip())) for caption in captions]
    wide = load_tokenizer(tmp_path / "own.model", context=64)
    said = lengths(data([(f"{i}.png", c) for i, c in enumerate(captions)]), wide, context, every=True).said
    cut = sum(n > context - 3 for n in counts)
    assert said.startswith(f"{min(counts)} to {max(counts)} tokens, half of them at most {sorted(counts)[2]}; ")
    assert f"{cut} ({cut / 5:.1%}) are cut to {context - 3}" in said


def test_longer_than_can_be_counted_is_said_so_and_none_cut_too(tmp_path):
    train_tokenizer(["a fox and an owl"], tmp_path / "own.model", vocab_size=40)
    wide = load_tokenizer(tmp_path / "own.model", context=16)
    assert "to 13 or more tokens" in lengths(data([("a.png", "fox " * 99)]), wide, 4, every=True).said
    assert "none is cut, there is room for 13" in lengths(data([("a.png", "fox")]), wide, 16, every=True).said


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve images of one's own: two of equal pixels, one that is none, and one that is missing."""
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "3.png", tmp_path / "same.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "4.png").read_bytes()[:60])
    return tmp_path


def test_images_are_read_as_a_run_reads_them_and_each_bad_one_is_named(photos):
    names = [*(f"{i}.png" for i in range(10)), "same.png", "torn.png", "gone.png"]
    pixels, findings = pictures(data([(n, "x") for n in names], root=photos), size=8, crop="squash", every=True)
    assert len(pixels) == 10
    unreadable, equal = findings
    assert unreadable.wrong
    assert unreadable.said == "2 of 13 images"
    assert [line.partition("#")[0] for line in unreadable.shown] == ["torn.png", "gone.png"]
    assert equal == Finding("equal", "1 of 13 images, with the pixels of another", shown=["same.png#0 and 3.png#0"])


def test_image_files_without_a_caption_in_any_split_are_named(photos):
    ours, theirs = (image_files(photos, [(n, "x") for n in names]) for names in (["0.png", "1.png"], ["2.png"]))
    (finding,) = without_captions(ours, [theirs])
    assert number([finding], "no caption") == 12 - 3
    assert "of 12 image files" in finding.said
    everything = image_files(photos, [(p.name, "x") for p in photos.glob("*.png")])
    assert list(without_captions(everything, [])) == []


@given(n=st.integers(0, 3 * CAPTIONS), at_most=st.integers(1, CAPTIONS))
def test_a_sample_is_in_order_without_repetition_and_always_the_same(n, at_most):
    rows = some(n, at_most)
    assert len(rows) == min(n, at_most)
    assert rows == sorted(set(rows)) == some(n, at_most)
    assert all(0 <= i < n for i in rows)
