"""Findings about data equal those of plain counting, and faults are named."""

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
from grr.data.collate import IGNORE
from grr.data.inspect import (
    MAX_CAPTIONS,
    Data,
    Finding,
    check_captions,
    check_counts,
    check_epoch,
    check_false_negatives,
    check_images,
    check_overlap,
    check_records,
    check_tokens,
    check_unused_images,
    sample_numbers,
)
from grr.data.order import epoch_order
from grr.data.pairs import Pairs, Row, Texts, image_files
from grr.tokenizers import load_tokenizer, train_tokenizer

ROWS = st.lists(
    st.tuples(st.sampled_from(["a.png", "b.png", "c.png", "d.png"]), st.sampled_from(["fox", "owl", "key"])),
    min_size=1,
    max_size=12,
)


def data(rows, name="data", root="photos") -> Data:
    return Data(name, image_files(Path(root), [Row(image, caption, "a table") for image, caption in rows]))


def number(findings, what: str) -> int:
    """The first number of a finding; 0 without one."""
    messages = [finding.message for finding in findings if finding.what == what]
    return int(re.search(r"[\d,]+", messages[0])[0].replace(",", "")) if messages else 0


@given(rows=ROWS)
def test_counts_equal_those_of_plain_counting(rows):
    findings = [*check_counts(data(rows)), *check_captions(data(rows))]
    images_of = {caption: {image for image, c in rows if c == caption} for _, caption in rows}
    assert number(findings, "pairs") == len(rows)
    assert f"of {len({image for image, _ in rows})} images" in findings[0].message
    assert number(findings, "duplicates") == len(rows) - len(set(rows))
    assert number(findings, "same caption") == sum(len(images) > 1 for images in images_of.values())
    assert not any(finding.wrong for finding in findings)


class Own(Pairs):
    """Pairs of a user's data set, whose captions were not checked by a reader."""

    def __init__(self, captions: list[str], image_of: list[int]) -> None:
        super().__init__(Texts.of(f"{i}.png" for i in range(len(captions))), Texts.of(captions), np.array(image_of))

    def load(self, i: int, *, size: int, crop: str):
        raise NotImplementedError


@given(captions=st.lists(st.sampled_from(["", "fox", "owl"]), min_size=1))
def test_empty_captions_of_pairs_without_records_are_counted(captions):
    own = Data("data", Own(captions, list(range(len(captions)))))
    assert list(check_records(own, every=True)) == []
    findings = list(check_captions(own))
    assert number(findings, "empty") == captions.count("")
    assert [finding.what for finding in findings if finding.wrong] == ["empty"] * ("" in captions)


def test_skipped_records_are_counted_and_named():
    rows = [
        Row("a.png", "x", "t line 2"),
        Row("", "y", "t line 3"),
        Row("b.png", " ", "t line 4"),
        Row("b.png", ["x", "", ""], "t line 5"),
    ]
    findings = list(check_records(Data("data", image_files(Path("photos"), rows)), every=False))
    assert findings == [
        Finding("records", "6 in the files = 2 read + 4 skipped"),
        Finding("skipped", "1 of 6 records: names no image", wrong=True, examples=["t line 3"]),
        Finding("skipped", "3 of 6 records: empty caption", wrong=True, examples=["t line 4", "t line 5", "t line 5"]),
    ]


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=9), batch_size=st.integers(2, 4), seed=st.integers(0, 9))
def test_reported_order_statistics_equal_those_of_the_batches(sizes, batch_size, seed):
    batch_size = min(batch_size, len(sizes))
    image_of = [j for j, size in enumerate(sizes) for _ in range(size)]
    captions = ["fox" if i % 3 else f"owl {i}" for i in range(len(image_of))]
    own = Data("data", Own(captions, image_of))
    batches = epoch_order(np.array(image_of), seed=seed, epoch=0, batch_size=batch_size)
    finding = check_epoch(own, batch_size)
    assert finding.message.startswith(f"uses {batches.size:,} of {len(image_of):,} pairs ")
    assert f"{len(image_of) - batches.size:,} are left out" in finding.message
    assert finding.wrong == (len(image_of) - batches.size > len(image_of) / 4)
    assert len(finding.examples) == min(3, sum(size > len(batches) for size in sizes))
    repeated = [sum(captions[j] == captions[i] for j in batch) > 1 for batch in batches for i in batch]
    found = check_false_negatives(own, batch_size, seed)
    assert (found is None) == (not any(repeated))
    if found is not None:
        assert found.message.startswith(f"{np.mean(repeated):.1%} of the pairs have a negative with their own caption")
        assert found.wrong == (np.mean(repeated) > 0.1)


@given(ours=ROWS, theirs=ROWS, elsewhere=st.booleans())
def test_images_and_captions_that_two_parts_share_are_counted(ours, theirs, elsewhere):
    held_out, train = data(ours, "validation"), data(theirs, "data", "others" if elsewhere else "photos")
    findings = list(check_overlap(held_out, train, 0, every=False))
    both = set() if elsewhere else {image for image, _ in ours} & {image for image, _ in theirs}
    assert findings[0].wrong == bool(both)
    if both:
        assert number(findings, "shared") == len(both)
    assert number(findings, "shared captions") == sum(caption in {c for _, c in theirs} for _, caption in ours)


def test_images_of_equal_pixels_in_both_parts_are_a_fault():
    findings = list(check_overlap(data([("a.png", "x")], "validation"), data([("b.png", "y")]), 1, every=True))
    assert [(finding.wrong, number([finding], "shared")) for finding in findings] == [(True, 1)]


def test_labelled_pairs_report_their_classes_and_may_repeat_questions():
    pairs = data([("a.png", "what"), ("b.png", "what"), ("c.png", "what")]).pairs
    labelled = Data("data", Labelled(pairs, ["fox", "owl"], np.array([0, 0, IGNORE])))
    found = {finding.what: finding for finding in (*check_counts(labelled), *check_captions(labelled))}
    assert found["classes"].message == "2, of 0 to 2 pairs; 1 of 3 pairs in none"
    assert found["first"].message.endswith("'what' -> fox")
    assert "same caption" not in found


@pytest.mark.parametrize("context", [5, 8, 16])
def test_token_counts_are_those_of_sentencepiece_and_long_captions_are_cut(tmp_path, context):
    captions = ["fox", "a fox and an owl", "a fox and an owl and a key", "key " * 7, "owl " * 40]
    train_tokenizer(captions, tmp_path / "own.model", vocab_size=40)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "own.model"))
    counts = [len(plain.encode(caption.strip())) for caption in captions]
    wide = load_tokenizer(tmp_path / "own.model", context_length=64)
    pairs = data([(f"{i}.png", c) for i, c in enumerate(captions)])
    message, _ = (finding.message for finding in check_tokens(pairs, wide, context, every=True))
    cut = sum(n > context - 3 for n in counts)
    assert message.startswith(f"{min(counts)} to {max(counts)} tokens, half of them at most {sorted(counts)[2]}; ")
    assert f"{cut} ({cut / 5:.1%}) are truncated to {context - 3}" in message


def test_captions_longer_than_can_be_counted_are_reported(tmp_path):
    train_tokenizer(["a fox and an owl"], tmp_path / "own.model", vocab_size=40)
    wide = load_tokenizer(tmp_path / "own.model", context_length=16)
    long, short = data([("a.png", "fox " * 99)]), data([("a.png", "fox")])
    assert "to 13 or more tokens" in next(check_tokens(long, wide, 4, every=True)).message
    assert "none exceeds the limit of 13" in next(check_tokens(short, wide, 16, every=True)).message


@given(captions=st.lists(st.text(st.sampled_from("abx狐 "), min_size=1, max_size=6).filter(str.strip), min_size=1))
def test_unknown_tokens_and_captions_with_equal_tokens_are_counted(of_letters, captions):
    pairs = data([(f"{i}.png", c) for i, c in enumerate(captions)])
    _, finding = check_tokens(pairs, of_letters, 32, every=True)
    captions = [" ".join(c.split()) for c in captions]
    plain = [of_letters.encode(c)[1:] for c in captions]
    plain = [ids[: ids.index(of_letters.eos_id)] for ids in plain]
    unknown, total = sum(ids.count(of_letters.unk_id) for ids in plain), sum(map(len, plain))
    texts, encoded = len(set(captions)), len({tuple(ids) for ids in plain})
    fraction = f"{unknown:,} of {total:,} tokens (" if unknown else f"none of {total:,} tokens is"
    assert finding.message.startswith(fraction)
    assert (f"{texts} distinct captions become {encoded}" in finding.message) == (encoded < texts)
    assert finding.wrong == (unknown > total / 20 or texts - encoded > texts / 100)


@pytest.fixture(scope="module")
def of_letters(tmp_path_factory):
    """A vocabulary of a, b and c: all other characters are unknown."""
    path = tmp_path_factory.mktemp("words") / "own.model"
    return train_tokenizer(["a b c"] * 9, path, vocab_size=20, context_length=32)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of twelve files: eleven images, two of which have equal pixels, and one truncated file."""
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "3.png", tmp_path / "same.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "4.png").read_bytes()[:60])
    return tmp_path


def test_images_are_read_as_a_run_reads_them_and_each_bad_one_is_named(photos):
    names = [*(f"{i}.png" for i in range(10)), "same.png", "torn.png", "gone.png"]
    pixels, findings = check_images(data([(n, "x") for n in names], root=photos), size=8, crop="squash", every=True)
    assert len(pixels) == 10
    unreadable, equal = findings
    assert unreadable.wrong
    assert unreadable.message == "2 of 13 images"
    assert [line.partition("#")[0] for line in unreadable.examples] == ["torn.png", "gone.png"]
    assert equal == Finding("equal", "1 of 13 images, with the pixels of another", examples=["same.png#0 and 3.png#0"])


def test_image_files_without_a_caption_in_any_split_are_named(photos):
    ours, theirs = (data([(n, "x") for n in names], root=photos).pairs for names in (["0.png", "1.png"], ["2.png"]))
    (finding,) = check_unused_images(ours, [theirs])
    assert number([finding], "no caption") == 12 - 3
    assert "of 12 image files" in finding.message
    everything = data([(p.name, "x") for p in photos.glob("*.png")], root=photos).pairs
    assert list(check_unused_images(everything, [])) == []


@given(n=st.integers(0, 3 * MAX_CAPTIONS), at_most=st.integers(1, MAX_CAPTIONS))
def test_a_sample_of_numbers_is_sorted_unique_and_reproducible(n, at_most):
    rows = sample_numbers(n, at_most)
    assert len(rows) == min(n, at_most)
    assert rows == sorted(set(rows)) == sample_numbers(n, at_most)
    assert all(0 <= i < n for i in rows)
