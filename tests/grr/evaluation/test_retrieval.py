"""Recall against counting in plain Python, and against anything that should not change it."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.evaluation.retrieval import retrieval

DIRECTIONS = ("image_to_text", "text_to_image")
owners = st.lists(st.integers(0, 6), min_size=1, max_size=20)  # the image of each text, of seven images
seeds = st.integers(0, 999)


def whole(rows: int, levels: int, seed: int) -> torch.Tensor:
    """Vectors of few different whole numbers: their scores are exact, and often equal."""
    return torch.randint(-levels, levels + 1, (rows, 3), generator=torch.Generator().manual_seed(seed)).float()


def by_counting(image: torch.Tensor, text: torch.Tensor, owner: list[int], k: int) -> tuple[float, float]:
    """Both recalls at k with exact fractions, one comparison at a time."""
    rows = [[[Fraction(x) for x in row] for row in side.tolist()] for side in (image, text)]
    score = [[sum(a * b for a, b in zip(i, t, strict=True)) for t in rows[1]] for i in rows[0]]
    texts = range(len(owner))
    found_images = found_texts = 0
    for t in texts:
        found_images += sum(score[i][t] >= score[owner[t]][t] for i in range(len(image)) if i != owner[t]) < k
    for i in set(owner):
        best = max(score[i][t] for t in texts if owner[t] == i)
        found_texts += sum(score[i][t] >= best for t in texts if owner[t] != i) < k
    return found_texts / len(set(owner)), found_images / len(owner)


def assert_counted(result: dict[str, float], image: torch.Tensor, text: torch.Tensor, owner: list[int]) -> None:
    assert list(result) == [f"{direction}_r{k}" for direction in DIRECTIONS for k in (1, 5, 10)]
    for k in (1, 5, 10):
        expected = by_counting(image, text, owner, k)
        assert [result[f"{direction}_r{k}"] for direction in DIRECTIONS] == pytest.approx(list(expected))


@given(owner=owners, levels=st.integers(1, 20), seed=seeds, chunk=st.integers(1, 25))
def test_recall_equals_a_count_with_many_ties_and_any_number_of_texts(owner, levels, seed, chunk):
    image, text = whole(7, levels, seed), whole(len(owner), levels, seed + 1)
    assert_counted(retrieval(image, text, torch.tensor(owner), chunk=chunk), image, text, owner)


@given(n=st.integers(1, 12), levels=st.integers(1, 5), seed=seeds)
def test_recall_equals_a_count_with_five_captions_per_image(n, levels, seed):
    owner = [i for i in range(n) for _ in range(5)]
    image = whole(n, levels, seed)
    text = image[owner] + whole(5 * n, 1, seed + 1)  # near their images, so that some are found
    assert_counted(retrieval(image, text, torch.tensor(owner)), image, text, owner)


@given(owner=owners, seed=seeds, doubled=st.booleans())
def test_real_embeddings_are_ranked_as_exact_fractions(owner, seed, doubled):
    generator = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(7, 16, generator=generator), dim=1)
    text = torch.nn.functional.normalize(image[owner] + torch.randn(len(owner), 16, generator=generator), dim=1)
    if doubled:  # the same picture twice, and the same sentence of two pictures: ties of real numbers
        image[1], text[-1] = image[0], text[0]
    assert_counted(retrieval(image, text, torch.tensor(owner)), image, text, owner)


@given(owner=owners, levels=st.integers(1, 20), seed=seeds)
def test_the_order_of_images_and_of_texts_does_not_matter(owner, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    image, text, owner = whole(7, levels, seed), whole(len(owner), levels, seed + 1), torch.tensor(owner)
    images, texts = torch.randperm(7, generator=generator), torch.randperm(len(owner), generator=generator)
    moved = images.argsort()[owner]  # where the image of each text has gone
    assert retrieval(image[images], text[texts], moved[texts]) == retrieval(image, text, owner)


@given(seed=seeds, chunk=st.sampled_from([1, 7, 64, 299, 300, 1000]), e=st.sampled_from([3, 64, 257]))
def test_equal_embeddings_tie_in_chunks_of_any_size(seed, chunk, e):
    """In floating point the score of equal vectors may differ in its last bit from chunk to chunk; here it cannot."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(1, e, generator=generator), dim=1).expand(60, e)
    text = torch.nn.functional.normalize(torch.randn(1, e, generator=generator), dim=1).expand(300, e)
    assert set(retrieval(image, text, torch.arange(60).repeat_interleave(5), chunk=chunk).values()) == {0.0}


@given(seed=seeds, chunk=st.integers(1, 300), power=st.integers(-60, 60))
def test_neither_the_chunk_nor_the_length_of_embeddings_changes_a_rank(seed, chunk, power):
    generator = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(60, 64, generator=generator), dim=1)
    owner = torch.arange(60).repeat_interleave(5)
    text = torch.nn.functional.normalize(image[owner] + torch.randn(300, 64, generator=generator) / 2, dim=1)
    expected = retrieval(image, text, owner)
    assert 0.1 < expected["image_to_text_r1"] < 1
    assert retrieval(image * 2.0**power, text, owner, chunk=chunk) == expected


def test_scores_that_differ_by_one_float32_step_are_ranked():
    image = 1 - torch.arange(20).unsqueeze(1) * 2.0**-24  # the neighbours of 1
    assert len(image.unique()) == 20
    result = retrieval(image, torch.ones(20, 1), torch.arange(20))
    assert [result[f"text_to_image_r{k}"] for k in (1, 5, 10)] == [0.05, 0.25, 0.5]  # image k has k before it


def test_a_perfect_model_has_recall_1():
    owner = torch.arange(20).repeat_interleave(5)
    assert set(retrieval(torch.eye(20), torch.eye(20)[owner], owner).values()) == {1.0}


def test_constant_embeddings_have_recall_0():
    assert set(retrieval(torch.zeros(20, 4), torch.zeros(20, 4), torch.arange(20)).values()) == {0.0}


def test_shapes_that_do_not_fit_are_refused_with_a_remedy():
    image, text, owner = torch.eye(3), torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match=r"image_of_text \[m\], got \[3, 3\], \[3, 3\] and \[2\]; image_of_text holds"):
        retrieval(image, text, owner[:2])
    with pytest.raises(ValueError, match=r"must be \[n, e\].*, got \[3, 3\], \[3, 2\] and \[3\]"):
        retrieval(image, text[:, :2], owner)
    with pytest.raises(ValueError, match=r"at least one text, got \[3, 3\], \[0, 3\] .* split is not empty"):
        retrieval(image, text[:0], owner[:0])
    with pytest.raises(ValueError, match=r"image_of_text must hold rows .* has 3, got 1 to 3; count images from 0"):
        retrieval(image, text, owner + 1)
    with pytest.raises(
        ValueError, match=r"text_embeddings must be finite, got \[0.0, nan, 0.0\] ... in row 1; check the weights"
    ):
        retrieval(image, text.masked_fill(torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool(), torch.nan), owner)
