"""Metrics of an evaluation, against formulas in float64, the training code, and counts by hand."""

import sys

import numpy as np
import pytest
import torch
from evaluate_worker import SEEN, Noise, a_model, several_captions
from hypothesis import given
from hypothesis import strategies as st

from grr.data import epoch_order, validation_steps
from grr.evaluation.captions import caption_metrics, treebank
from grr.evaluation.evaluate import caption_scores, exact_match, losses, recalls, validation_metrics
from grr.evaluation.examples import examples
from grr.evaluation.outputs import ModelOutputs, compute_outputs
from grr.training.step import evaluation_losses

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tokenizer):
    return a_model(tokenizer)


def observed(owners: list[int], seed: int, **changes) -> ModelOutputs:
    """Random numbers, as if a model had given them: of images 0 ... max(owners), with caption t of image owners[t]."""
    generator = torch.Generator().manual_seed(seed)
    pairs = Noise([10 * i + 3 for i in owners])
    unit = [
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1)
        for n in (max(owners) + 1, len(owners))
    ]
    values = {
        "pairs": pairs,
        **SEEN,
        "images": [owners.index(i) for i in range(max(owners) + 1)],
        "texts": list(range(len(owners))),
        "image_of_text": torch.tensor(owners),
        "image_embeddings": unit[0],
        "text_embeddings": unit[1],
        "token_losses": 5 * torch.rand(len(owners), generator=generator).double(),
        "tokens": torch.randint(1, 9, (len(owners),), generator=generator),
        "scale": 4.0,
        "bias": -1.0,
        "truncated": torch.zeros(len(owners), dtype=torch.bool),
        "max_tokens": 13,
        "written": [],
        "left_out": {},
    }
    return ModelOutputs(**values | changes)


def owned(images: int, extra: list[int]) -> list[int]:
    """One caption for each image, then more."""
    return [*range(images), *(i % images for i in extra)]


some_owners = st.builds(owned, st.integers(2, 9), st.lists(st.integers(0, 99), max_size=25))


@given(owners=some_owners, batch=st.integers(2, 12), seed=st.integers(0, 999), sigmoid=st.booleans())
def test_losses_equal_their_formulas_in_float64(owners, batch, seed, sigmoid):
    outputs = observed(owners, seed)
    found = losses(
        outputs,
        contrastive_batch=batch,
        contrastive_weight=0.5,
        captioning_weight=3.0,
        contrastive="sigmoid" if sigmoid else "softmax",
    )
    size = min(batch, max(owners) + 1)
    image, text = (
        outputs.image_embeddings.numpy().astype(np.float64),
        outputs.text_embeddings.numpy().astype(np.float64),
    )
    contrasts = []
    for row in epoch_order(outputs.pairs.image_of, seed=0, epoch=0, batch_size=size):
        own = [owners[t] for t in row]
        assert len(set(own)) == size
        logits = 4 * image[own] @ text[row].T
        if sigmoid:
            sign = 2 * np.eye(size) - 1
            contrasts.append(np.log1p(np.exp(-sign * (logits - 1))).sum() / size)
        else:
            both = [np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T)]
            contrasts.append(both[0].mean() + both[1].mean())
    captioning_loss = sum(outputs.token_losses.tolist()) / sum(outputs.tokens.tolist())
    assert found["contrastive_loss"] == pytest.approx(np.mean(contrasts), rel=1e-9)
    assert found["captioning_loss"] == pytest.approx(captioning_loss, rel=1e-9)
    assert found["perplexity"] == pytest.approx(np.exp(captioning_loss), rel=1e-9)
    assert found["loss"] == pytest.approx(0.5 * np.mean(contrasts) + 3 * captioning_loss, rel=1e-9)
    assert (found["contrastive_batch"], found["contrastive_weight"], found["captioning_weight"]) == (size, 0.5, 3.0)


@pytest.mark.parametrize("contrastive", ["softmax", "sigmoid"])
def test_losses_equal_those_of_a_validation_during_training(model, tokenizer, contrastive):
    """On data that fill their batches; another code path: trimmed loader batches, and the model's own forward pass."""
    pairs = Noise([j for j in range(48) for _ in range(2)])
    steps = validation_steps(pairs, tokenizer, 0, 1, 24, 8, 32, False, workers=0)
    expected = evaluation_losses(model, steps, contrastive=contrastive)
    found = losses(compute_outputs(model, pairs, tokenizer, CPU, **SEEN), contrastive_batch=24, contrastive=contrastive)
    assert {key: found[key] for key in expected.numbers()} == pytest.approx(expected.numbers(), rel=1e-5)


@pytest.mark.parametrize(("batch_size", "micro"), [(24, 8), (64, 16), (30, 6)])
def test_a_validation_and_an_evaluation_agree_on_data_that_fill_no_batch(model, tokenizer, batch_size, micro):
    """25 images of 1 to 3 captions: leftover pairs, micro-batches that do not divide the data, an unreadable image."""
    pairs = Noise(several_captions(25), bad=(4,))
    steps = validation_steps(pairs, tokenizer, 0, 1, batch_size, micro, 32, False, workers=0, max_bad_fraction=1)
    found = evaluation_losses(model, steps)
    expected = losses(compute_outputs(model, pairs, tokenizer, CPU, **SEEN), contrastive_batch=batch_size)
    assert found.captioning_loss == pytest.approx(expected["captioning_loss"], rel=1e-5)
    if batch_size > 24:  # one batch of all readable images, but perhaps of other captions of them
        assert found.contrastive_batch == expected["contrastive_batch"] == 24
        assert found.contrastive_loss == pytest.approx(expected["contrastive_loss"], rel=0.05)


@given(owners=some_owners, seed=st.integers(0, 999))
def test_recalls_equal_those_of_sorting(owners, seed):
    outputs = observed(owners, seed)
    found = recalls(outputs)
    scores = (outputs.text_embeddings.double() @ outputs.image_embeddings.double().T).numpy()  # [m, n]
    for k in (1, 5, 10):
        text_to_image = [owners[t] in np.argsort(-scores[t])[:k] for t in range(len(owners))]
        image_to_text = [i in np.array(owners)[np.argsort(-scores[:, i])[:k]] for i in range(max(owners) + 1)]
        assert found[f"text_to_image_r{k}"] == pytest.approx(np.mean(text_to_image))
        assert found[f"image_to_text_r{k}"] == pytest.approx(np.mean(image_to_text))
    assert found["num_eval_images"] == max(owners) + 1


def test_a_caption_is_exact_if_it_equals_any_reference_after_tokenization(tokenizer):
    outputs = observed([0, 1, 2, 2], 0)
    first, second, _, fourth = outputs.pairs.captions
    outputs.written = [first, second + " x", fourth]
    assert exact_match(outputs, tokenizer) == pytest.approx(2 / 3)
    assert outputs.references == [[first], [second], list(outputs.pairs.captions)[2:]]
    assert caption_scores(outputs, tokenizer) == {
        **caption_metrics(outputs.references, outputs.written),
        "exact": exact_match(outputs, tokenizer),
    }


def test_validation_metrics_use_the_first_images_and_leave_the_model_unchanged(model, tokenizer):
    pairs = Noise(several_captions(30), bad=(4,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics, shown = validation_metrics(model, pairs, tokenizer, CPU, num_eval_images=20, **SEEN)
    outputs = compute_outputs(model, pairs, tokenizer, CPU, images=20, generation={}, **SEEN)
    assert metrics == {**recalls(outputs), "caption_exact": exact_match(outputs, tokenizer)}
    assert metrics["num_eval_images"] == 19
    assert [c.written for c in shown.captions] == [c.written for c in examples(outputs).captions]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_validation_of_a_training_run_does_not_need_nltk(model, tokenizer, monkeypatch):
    treebank.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    metrics, _ = validation_metrics(model, Noise(several_captions(6)), tokenizer, CPU, num_eval_images=6, **SEEN)
    assert metrics["num_eval_images"] == 6
