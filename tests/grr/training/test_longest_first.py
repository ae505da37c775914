"""A global batch in the order of its captions' lengths has the loss and the gradients of the same pairs unsorted."""

from itertools import islice

import numpy as np
import pytest
import torch

from grr.data import Batch, Pairs, training_steps
from grr.models.builders import grr_coca_tiny
from grr.parallel.initialize import initialize
from grr.parallel.process_group import process_group
from grr.tokenizers import Tokenizer, train_tokenizer
from grr.training.step import global_batch_step

PAIRS = 24


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (PAIRS, 16, 16, 3), dtype=np.uint8)
    words = [" ".join(rng.choice(["red", "blue", "cat", "dog"], n)) for n in rng.integers(1, 12, PAIRS)]
    dataset = [{"image": image, "caption": text} for image, text in zip(images, words, strict=True)]
    return Pairs.from_dataset(dataset, image="image", caption="caption")


@pytest.fixture(scope="module")
def tokenizer(pairs, tmp_path_factory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "my.model"
    return train_tokenizer(pairs.captions, file, vocab_size=40, context_length=24)


def stepped(pairs, tokenizer, micro: int, *, longest_first: bool, **options) -> tuple[list[Batch], list, dict]:
    """The micro-batches of the second step, its losses, and the gradients of a model in float64."""
    sizes = {"rank": 0, "world": 1, "batch_size": 12, "micro_batch_size": micro, "image_size": 16}
    order = {"seed": 5, "start_step": 1, "pin_memory": False, "longest_first": longest_first}
    (batches,) = islice(training_steps(pairs, tokenizer, **sizes, **order, workers=0), 1)
    with process_group():
        with torch.device("meta"):
            model = grr_coca_tiny(vocab_size=40, context_length=24, image_size=16, patch_size=4, **options).double()
        initialize(model, torch.device("cpu"), seed=0)
        losses = global_batch_step(model, batches, seed=3).read()
    return batches, list(losses[:3]), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def columns(batches: list[Batch]) -> int:
    return sum(batch.ids.numel() for batch in batches)


@pytest.mark.parametrize("micro", [12, 4, 2])
def test_sorting_a_global_batch_changes_neither_its_loss_nor_its_gradients(pairs, tokenizer, micro):
    plain, losses, gradients = stepped(pairs, tokenizer, micro, longest_first=False)
    ours, same_losses, same_gradients = stepped(pairs, tokenizer, micro, longest_first=True)
    names = [[name for batch in batches for name in batch.names] for batches in (plain, ours)]
    assert names[0] != names[1]
    assert sorted(names[0]) == sorted(names[1])
    assert same_losses == pytest.approx(losses, rel=1e-12)
    assert same_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert columns(ours) <= columns(plain)


@pytest.mark.parametrize("micro", [4, 2])
def test_sorted_batches_have_fewer_columns_over_some_steps(pairs, tokenizer, micro):
    sizes = {"rank": 0, "world": 1, "batch_size": 12, "micro_batch_size": micro, "image_size": 16, "workers": 0}
    options = {"seed": 5, "start_step": 0, "pin_memory": False}
    plain, ours = (
        sum(map(columns, islice(training_steps(pairs, tokenizer, **sizes, **options, longest_first=first), 8)))
        for first in (False, True)
    )
    assert ours < plain


def test_dropout_and_patch_dropout_are_those_of_the_place_in_the_sorted_batch_for_any_split(pairs, tokenizer):
    drop = {"dropout": 0.2, "patch_dropout": 0.5}
    _, losses, gradients = stepped(pairs, tokenizer, 12, longest_first=True, **drop)
    _, same_losses, same_gradients = stepped(pairs, tokenizer, 4, longest_first=True, **drop)
    _, others, _ = stepped(pairs, tokenizer, 4, longest_first=False, **drop)
    assert same_losses == pytest.approx(losses, rel=1e-12)
    assert others != pytest.approx(losses, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
