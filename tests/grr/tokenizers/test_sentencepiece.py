"""The layout of 65 ids, decoding as its inverse, and robustness to any text."""

import csv
import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from grr.tokenizers import Tokenizer, open_tokenizer, train_tokenizer

COLOURS, THINGS, PLACES = ("red", "blue", "green"), ("fox", "bread", "owl"), ("table", "hill", "boat")
CAPTIONS = [f"a {colour} {thing} on a {place}" for colour in COLOURS for thing in THINGS for place in PLACES]
HOSTILE = ["", " \n\t ", "🦊🍞", "שלום עולם", "\u202eabc\u202c", "a\x00b\x07\x1b[31m", "\ud800 lone \udfff",
           "word " * 10_000, "x" * 100_000, "\u200b" * 5_000, "naïve { } ~", "\ufeffbom", "<pad> </s>"]  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "own.model"
    return train_tokenizer(CAPTIONS, path, vocab_size=80, context_length=64)


@pytest.fixture(scope="module")
def t5(shared_data) -> Tokenizer:
    return Tokenizer(shared_data / "t5/spiece.model")


def assert_layout(tok: Tokenizer, ids: list[int]) -> int:
    """Check the layout of SPEC, BOS t1 ... tn EOS PAD ... PAD CLS PAD, and return n."""
    assert len(ids) == tok.context_length + 1
    assert ids[0] == tok.bos_id == tok.vocab_size - 2
    assert ids[-2:] == [tok.cls_id, 0] == [tok.vocab_size - 1, 0]
    n = ids.index(1) - 1
    assert set(ids[n + 2 : -2]) <= {0}
    assert set(ids[1 : n + 1]).isdisjoint({0, 1, tok.bos_id, tok.cls_id})
    return n


@given(words=st.lists(st.sampled_from(["a", "red", "fox", "on", "table", "boat"]), max_size=100))
def test_every_caption_has_the_layout_and_decodes_to_itself_up_to_the_cut(own, words):
    text = " ".join(words)
    ids = own.encode(text)
    n = assert_layout(own, ids)
    assert text.startswith(own.decode(ids))
    if n < own.context_length - 3:
        assert own.decode(ids) == text
    else:
        assert n == own.context_length - 3


@given(text=st.text(max_size=300))
def test_every_text_has_the_layout(own, text):
    assert_layout(own, own.encode(text))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_have_the_layout(own, text):
    ids = own.encode(text)
    assert_layout(own, ids)
    assert isinstance(own.decode(ids), str)


def test_cutting_a_long_text_early_changes_no_token_that_is_kept(own, tmp_path):
    text = "a red fox on a boat " * 3_000
    assert own.encode(text) == own.encode(" ".join(text.split()[:200]))


def test_decode_takes_tensors_and_skips_ids_that_are_not_pieces(own):
    ids = own.encode("a red fox")
    assert own.decode(torch.tensor(ids)) == "a red fox"
    assert own.decode([own.cls_id, 0, *ids[1:4], own.bos_id, 10**6, *ids[4:]]) == "a red fox"


def test_t5_has_the_ids_of_the_paper(t5):
    assert t5.vocab_size == 32_102
    assert (t5.bos_id, t5.cls_id) == (32_100, 32_101)
    cat = [71, 1202, 13, 3, 9, 1712]
    assert t5.encode("A photo of a cat") == [32_100, *cat, 1, *[0] * 55, 32_101, 0]
    assert t5.encode("two dogs run in the snow .")[1:9] == [192, 3887, 661, 16, 8, 2983, 3, 5]
    assert t5.encode("  two \n dogs ") == t5.encode("two dogs")
    assert 2 in t5.encode("{")


def test_t5_agrees_with_sentencepiece_on_real_captions(t5, shared_data):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "t5/spiece.model"))
    images = json.loads((shared_data / "photos/dataset_photos.json").read_text())["images"][:400]
    for sentence in (s["raw"] for image in images for s in image["sentences"]):
        ids = t5.encode(sentence)
        n = assert_layout(t5, ids)
        assert ids[1 : n + 1] == plain.encode(sentence)[:61]
        if 2 not in ids:
            assert t5.decode(ids) == " ".join(sentence.split())


def test_a_vocabulary_trained_on_real_captions_spells_them_all(shared_data, tmp_path):
    with (shared_data / "formats/flickr30k_kaggle_style.head200.csv").open() as file:
        captions = [row[1] for row in csv.reader(file)][1:]
    tok = train_tokenizer(captions, tmp_path / "own.model", vocab_size=400)
    assert tok.vocab_size <= 400
    for caption in captions:
        assert_layout(tok, tok.encode(caption))
        assert " ".join(caption.split()).startswith(tok.decode(tok.encode(caption)))


def test_equal_captions_train_equal_vocabularies(own, tmp_path):
    assert train_tokenizer(iter(CAPTIONS), tmp_path / "x.model", vocab_size=80).fingerprint == own.fingerprint


def test_a_small_corpus_yields_fewer_ids_than_vocab_size(tmp_path):
    assert train_tokenizer(["a b", "b c"], tmp_path / "x.model", vocab_size=5_000).vocab_size < 50


def test_pickling_and_saving_preserve_a_tokenizer(own, tmp_path):
    own.save(tmp_path / "copy.model")
    for copy in (pickle.loads(pickle.dumps(own)), Tokenizer(tmp_path / "copy.model")):
        assert copy.encode("a red fox") == own.encode("a red fox")
        assert copy.fingerprint == own.fingerprint


def test_a_run_trains_its_tokenizer_once_or_copies_the_one_of_the_config(own, tmp_path):
    assert not dist.is_initialized()
    first = open_tokenizer(CAPTIONS, tmp_path / "run.model", vocab_size=80, context_length=32)
    again = open_tokenizer(["other captions"], tmp_path / "run.model", True, vocab_size=80, context_length=32)
    assert first.fingerprint == again.fingerprint
    assert len(again.encode("a")) == 33
    own.save(tmp_path / "given.model")
    given_one = open_tokenizer([], tmp_path / "run2.model", path=str(tmp_path / "given.model"))
    assert given_one.fingerprint == own.fingerprint
    assert Tokenizer(tmp_path / "run2.model").fingerprint == own.fingerprint


def test_a_new_run_replaces_the_tokenizer_that_a_failed_start_left(tmp_path):
    stale = open_tokenizer(CAPTIONS[:3], tmp_path / "run.model", vocab_size=40)
    new = open_tokenizer(CAPTIONS, tmp_path / "run.model", vocab_size=80)
    assert new.fingerprint == open_tokenizer(CAPTIONS, tmp_path / "clean.model", vocab_size=80).fingerprint
    assert new.fingerprint != stale.fingerprint


def test_a_file_that_is_not_a_tokenizer_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere.model; T5's vocabulary is the file"):
        Tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ValueError, match=r"text.model is not a SentencePiece model .*; download it again"):
        Tokenizer(tmp_path / "text.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_prefix=str(tmp_path / "other"), vocab_size=25, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"must have the ids 0, 1 and 2, as in T5, got \(-1, 2, 0\)"):
        Tokenizer(tmp_path / "other.model")
    with pytest.raises(ValueError, match="a vocabulary of vocab_size=512 cannot be trained"):
        train_tokenizer(["", "  "], Path(tmp_path / "none.model"))


def test_a_context_without_room_is_refused(own, tmp_path):
    own.save(tmp_path / "x.model")
    with pytest.raises(ValueError, match="got context_length=3"):
        Tokenizer(tmp_path / "x.model", context_length=3)


@pytest.mark.parametrize("captions", ["a red fox", b"a red fox", None, 3])
def test_captions_that_are_not_a_list_of_strings_are_refused(tmp_path, captions):
    with pytest.raises(ValueError, match=r"train_tokenizer: captions must be a list of strings, got .*; give"):
        train_tokenizer(captions, tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()
