"""Random batches: their lengths, labels and layout."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_rows import label_rows

from grr.data.collate import IGNORE
from grr.tokenizers import Tokenizer
from grr.tokenizers.sentencepiece import train_tokenizer
from grr.training.random_batches import NumberTokenizer, random_batches


@given(
    mean=st.none() | st.integers(1, 20),
    b=st.integers(1, 6),
    count=st.integers(1, 3),
    context_length=st.integers(4, 24),
    seed=st.integers(0, 99),
)
def test_random_captions_are_as_long_as_asked_and_labelled_to_their_end(mean, b, count, context_length, seed):
    room = context_length - 3
    sizes = {"vocab_size": 50, "context_length": context_length, "image_size": 8}
    batches = random_batches(count, batch_size=b, caption_tokens=mean, seed=seed, **sizes)
    assert len(batches) == count
    for batch in batches:
        words = ((batch.ids > 2) & (batch.ids < 48)).sum(1)  # of 50: neither PAD, EOS, UNK nor BOS, CLS
        assert batch.images.shape == (b, 3, 8, 8)
        assert words.min() >= 1
        assert words.max() + 3 <= batch.ids.shape[1] <= context_length
        assert ((label_rows(batch) != IGNORE).sum(1) == words + 1).all()  # every word and EOS
        if mean is None:
            assert (words == room).all()


def test_random_captions_have_the_asked_length_on_average():
    sizes = {"vocab_size": 100, "context_length": 64, "image_size": 1}
    (batch,) = random_batches(1, batch_size=1000, caption_tokens=15, **sizes)
    words = (label_rows(batch) != IGNORE).sum(1).float() - 1
    assert abs(words.mean() - 15) < 5 * math.sqrt(15 / 1000)  # Poisson: five standard errors


def test_the_seed_decides_the_batches():
    sizes = {"batch_size": 2, "vocab_size": 100, "context_length": 16, "image_size": 4}
    one, same, other = (random_batches(1, seed=seed, **sizes)[0] for seed in (3, 3, 4))
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.ids, same.ids)
    assert not torch.equal(one.images, other.images)
    assert not torch.equal(one.ids, other.ids)


@given(text=st.text(alphabet="abcde ", max_size=60))
def test_a_caption_of_numbers_is_laid_out_as_the_tokenizer_lays_out_words(tokenizer, text):
    ids = tokenizer.encode(text)
    end = ids.index(tokenizer.eos_id)
    numbers = NumberTokenizer(tokenizer.vocab_size, tokenizer.context_length)
    assert numbers.encode(ids[1:end]) == ids
    assert (numbers.pad_id, numbers.eos_id) == (tokenizer.pad_id, tokenizer.eos_id)
    assert (numbers.bos_id, numbers.cls_id) == (tokenizer.bos_id, tokenizer.cls_id)
    assert numbers.decode(ids).split() == [str(i) for i in ids]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    file = tmp_path_factory.mktemp("t") / "t.model"
    return train_tokenizer(["a bad cab", "dead bee", "ace"], file, vocab_size=30, context_length=16)
