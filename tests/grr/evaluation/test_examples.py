"""The samples of a page, against sorting all candidates by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from evaluate_worker import SEEN, Noise, a_model, several_captions
from hypothesis import given
from hypothesis import strategies as st

from grr.data.collate import collate_captions
from grr.data.images import BadImage
from grr.evaluation.attention import word_attention
from grr.evaluation.evaluate import validation_metrics
from grr.evaluation.examples import Match, examples, training_examples
from grr.evaluation.outputs import ModelOutputs, compute_outputs

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("process_group")


def observed(owners: Sequence[int], seed: int, **changes: Any) -> ModelOutputs:
    """Random embeddings of images and of their captions; caption t is of image owners[t]."""
    generator = torch.Generator().manual_seed(seed)
    n, m = max(owners) + 1, len(owners)
    image, text = (torch.nn.functional.normalize(torch.randn(k, 4, generator=generator), dim=1) for k in (n, m))
    zeros = torch.zeros(m)
    left = {
        "scale": 1.0,
        "bias": 0.0,
        "truncated": zeros.bool(),
        "max_tokens": 9,
        "written": [f"caption {i}" for i in range(n)],
        "left_out": {},
    }
    images = [owners.index(i) for i in range(n)]
    return ModelOutputs(
        Noise(list(owners)), 32, "squash", images, list(range(m)), torch.tensor(owners), image, text, zeros, zeros,
        **left | changes,
    )  # fmt: skip


def by_hand(scores: list[float], right: set[int]) -> list[tuple[int, int, bool]]:
    """Candidates with their ranks: the five nearest, and the first right one behind them if none of them is right."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    shown = ranked[:5] + [i for i in ranked[5:] if i in right and not right & set(ranked[:5])][:1]
    return [(i, ranked.index(i) + 1, i in right) for i in shown]


def summary(matches: list[Match], candidates: list) -> list[tuple[int, int, bool]]:
    places = [next(i for i, c in enumerate(candidates) if same(c, match.candidate)) for match in matches]
    return [(place, match.rank, match.right) for place, match in zip(places, matches, strict=True)]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@given(extra=st.lists(st.integers(0, 10), max_size=9), n=st.integers(1, 11), seed=st.integers(0, 999))
def test_the_ranks_are_those_of_sorting_all_candidates(extra, n, seed):
    owners = [*range(n), *(i % n for i in extra)]
    outputs = observed(owners, seed)
    shown = examples(outputs)
    captions, thumbnails = list(outputs.pairs.captions), [outputs.thumbnail(i) for i in range(n)]
    scores = outputs.text_embeddings @ outputs.image_embeddings.T  # [m, n]
    step = max(1, len(owners) // 8)
    places = list(range(0, len(owners), step))[:8]
    assert len(shown.retrievals) == len(places)
    for t, one in zip(places, shown.retrievals, strict=True):
        assert one.caption == captions[t]
        assert torch.equal(one.image, thumbnails[owners[t]])
        assert summary(one.images, thumbnails) == by_hand(scores[t].tolist(), {owners[t]})
        own = {i for i, owner in enumerate(owners) if owner == owners[t]}
        found = [(captions[i], rank, right) for i, rank, right in by_hand(scores[:, owners[t]].tolist(), own)]
        assert [(m.candidate, m.rank, m.right) for m in one.captions] == found
        assert [m.score for m in one.captions] == sorted((m.score for m in one.captions), reverse=True)
    expected = scores[places][:, [owners[t] for t in places]]
    torch.testing.assert_close(shown.similarities, expected)


def test_captions_are_named_and_counted():
    outputs = observed(list(range(20)), 0, written=["a", "b"] * 10)
    shown = examples(outputs)
    assert (len(shown.captions), shown.distinct_captions, shown.written_captions) == (16, 2, 20)
    assert [c.name for c in shown.captions] == [f"{i}.png#{i}" for i in range(16)]
    assert all(c.references == [outputs.pairs.captions[i]] for i, c in enumerate(shown.captions))


def test_a_word_has_the_mean_of_the_maps_of_its_tokens(tokenizer):
    model = a_model(tokenizer)
    outputs = compute_outputs(model, Noise(several_captions(9)), tokenizer, CPU, images=9, generation={}, **SEEN)
    outputs.written = ["a red fox number 3", *"xx", "", *"xx", "a white star", *"xx"]
    shown = examples(outputs, model, tokenizer)
    assert [one.words for one in shown.attention] == [["a", "red", "fox", "number", "3"], ["a", "white", "star"]]
    for one, i in zip(shown.attention, (0, 6), strict=True):
        assert torch.equal(one.image, outputs.thumbnail(i))
        torch.testing.assert_close(one.maps.sum((1, 2)), torch.ones(len(one.words)))
        ids, positions, *_ = collate_captions([tokenizer.encode(outputs.written[i])], pad_id=tokenizer.pad_id)
        pixels = outputs.pairs.load(outputs.images[i], size=32, crop="squash")[None]
        rows = word_attention(model, pixels, ids, positions=positions)[0]  # row i is read to write token i + 1
        pieces = [tokenizer.decode([token]) for token in ids[0, 1:].tolist()]
        last = max(i for i, piece in enumerate(pieces) if piece)
        if pieces[last].strip() == one.words[-1]:  # the last word is a single token
            torch.testing.assert_close(one.maps[-1], rows[last])


@pytest.mark.parametrize(("crop", "shape"), [("squash", (3, 40, 60)), ("center", (3, 40, 40)), ("clip", (3, 40, 40))])
def test_maps_lie_over_what_the_model_reads_of_an_image(tokenizer, crop, shape, monkeypatch):
    model = a_model(tokenizer)
    outputs = compute_outputs(model, Noise([0, 1]), tokenizer, CPU, generation={}, image_size=32, crop=crop)
    outputs.written = ["a red fox", "a white star"]
    wide = torch.arange(3 * 40 * 60).view(3, 40, 60).to(torch.uint8)
    monkeypatch.setattr(outputs.pairs, "thumbnail", lambda i: wide)
    image = examples(outputs, model, tokenizer).attention[0].image
    assert image.shape == shape
    assert torch.equal(image, wide if crop == "squash" else wide[:, :, 10:50])


def test_an_examination_has_attention_maps_and_the_same_numbers_as_without(tokenizer):
    pairs = Noise(several_captions(12))
    metrics, shown = validation_metrics(a_model(tokenizer), pairs, tokenizer, CPU, num_eval_images=12, **SEEN)
    assert 1 <= len(shown.attention) <= 3 or not any(shown.captions[i].written for i in (0, 4, 8))
    assert set(metrics) == {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} | {
        "num_eval_images",
        "caption_exact",
    }


def test_training_pairs_are_evenly_spaced_and_those_that_cannot_be_read_are_left_out():
    pairs = Noise(list(range(160)))
    read = pairs.thumbnail

    def thumbnail(i: int) -> torch.Tensor:
        if i == 20:
            raise BadImage("a hole")
        return read(i)

    pairs.thumbnail = thumbnail
    shown = training_examples(pairs).training
    assert [caption for _, caption in shown] == [pairs.captions[i] for i in range(0, 160, 10) if i != 20]
    assert torch.equal(shown[1][0], read(10))
