"""Losses against their formulas, written out in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.training.loss import captioning_loss, contrastive_loss, sigmoid_loss

pairs = st.tuples(st.integers(1, 9), st.integers(2, 16), st.integers(0, 999))


def unit(b: int, e: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, b, e, generator=generator, dtype=torch.float64)
    image, text = x / x.norm(dim=-1, keepdim=True)
    return image, text


@given(pairs=pairs, temperature=st.floats(0.01, 1))
def test_contrastive_loss_is_equation_1(pairs, temperature):
    image, text = unit(*pairs)
    n = len(image)
    score = [[math.exp(float(x @ y) / temperature) for y in text] for x in image]
    of_texts = sum(math.log(score[i][i] / sum(score[i])) for i in range(n))
    of_images = sum(math.log(score[i][i] / sum(row[i] for row in score)) for i in range(n))
    expected = -(of_texts + of_images) / n
    assert float(contrastive_loss(image, text, temperature)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(pairs=pairs, seed=st.integers(0, 99))
def test_losses_are_symmetric_and_do_not_depend_on_the_order_of_pairs(pairs, seed):
    image, text = unit(*pairs)
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))
    for loss in (contrastive_loss, sigmoid_loss):
        expected = loss(image, text)
        torch.testing.assert_close(loss(image[order], text[order]), expected)
        torch.testing.assert_close(loss(text, image), expected)


@given(pairs=pairs, bias=st.floats(-10, 0))
def test_sigmoid_loss_is_the_binary_cross_entropy_of_every_pair(pairs, bias):
    image, text = unit(*pairs)
    n = len(image)
    total = 0.0
    for i in range(n):
        for j in range(n):
            z = float(image[i] @ text[j]) / 0.1 + bias
            total -= math.log(1 / (1 + math.exp(-z if i == j else z)))
    assert float(sigmoid_loss(image, text, 0.1, bias)) == pytest.approx(total / n, rel=1e-9, abs=1e-9)


def test_the_loss_of_the_paper_is_the_sum_of_both_directions():
    """Table 2: 2 x 0.3610 + ln 12.9976 = 3.2868, published as 3.2864; with the mean it would be 2.93."""
    assert 2 * 0.3610 + math.log(12.9976) == pytest.approx(3.2864, abs=2e-3)
    same = torch.ones(4, 1)
    assert float(contrastive_loss(same, same)) == pytest.approx(2 * math.log(4))


def test_captioning_loss_is_the_mean_over_labels_that_are_not_ignored():
    logits = torch.zeros(1, 4, 10)
    logits[0, 3, 0] = 100.0  # a confident prediction at an ignored position
    labels = torch.tensor([[3, 4, 5, -100]])
    assert float(captioning_loss(logits, labels)) == pytest.approx(math.log(10))


@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
def test_embeddings_of_different_shapes_are_refused(loss):
    with pytest.raises(ValueError, match=r"must both be \[b, e\], got \[3, 4\] and \[2, 4\]"):
        loss(torch.ones(3, 4), torch.ones(2, 4))


@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
@pytest.mark.parametrize("temperature", [0, -0.1, math.nan])
def test_a_number_that_is_no_temperature_is_refused(loss, temperature):
    with pytest.raises(
        ValueError, match=f"{loss.__name__}: temperature must be positive, got temperature={temperature}"
    ):
        loss(torch.ones(3, 4), torch.ones(3, 4), temperature)


@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
def test_the_value_of_a_temperature_that_is_a_tensor_is_not_read(loss):
    """Reading it would wait for the GPU; a meta tensor has no value, and an error is raised where one is read."""
    embeddings = torch.ones(3, 4, device="meta")
    assert loss(embeddings, embeddings, torch.ones(1, device="meta")).device.type == "meta"
