"""A training step does not wait for the device, from the micro-batches on it to the optimizer's update."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from grr.evaluation.classification import classification_step
from grr.models.builders import grr_coca_tiny
from grr.models.heads import image_classifier, image_text_classifier
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.training.counters import Counters
from grr.training.finite import FiniteCheck
from grr.training.optim import adamw, clip_gradients
from grr.training.random_batches import random_batches
from grr.training.step import global_batch_step

CPU = torch.device("cpu")
SIZES = {"vocab_size": 512, "context_length": 16, "image_size": 32}
OPTIONS = {
    "softmax": {},
    "sigmoid": {"contrastive": "sigmoid"},
    "local negatives": {"negatives": "local"},
}
MODELS = {
    "fp32": ({}, {}),
    "bf16": ({}, {"bf16": True}),
    "checkpoint": ({}, {"bf16": True, "activation_checkpointing": True}),
    "learned temperature": ({"learned_temperature": True}, {}),
    "patch dropout": ({"patch_dropout": 0.5}, {"bf16": True}),
}
pytestmark = pytest.mark.usefixtures("process_group")


def a_run(model: nn.Module, device: torch.device, folder, step: Callable, micro: int, **parallel) -> Callable[[], None]:
    """The body of the recipes' loop, for batches that are on the device; the first call makes the optimizer's state."""
    parallelize(model, device, **parallel)
    initialize(model, device, seed=0)
    optimizer, finite = adamw(model.train()), FiniteCheck(folder)
    batches = [batch.to(device) for batch in random_batches(micro, batch_size=4, caption_tokens=7, **SIZES)]
    for batch in batches:
        batch.classes = torch.zeros(4, dtype=torch.int64, device=device)

    def body() -> None:
        losses = step(model, batches, 0)
        norm = clip_gradients(model, 1.0)
        finite.record(0, losses, norm, batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    body()
    return body


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("micro", [1, 4])
def test_a_step_of_pre_training_never_waits(kind, option, micro, tmp_path):
    arguments, parallel = MODELS[kind]
    model = grr_coca_tiny(dropout=0.1, **arguments)

    def step(*given):
        return global_batch_step(*given, **OPTIONS[option])

    body = a_run(model, CPU, tmp_path, step, micro, **parallel)
    with Counters() as counters:
        body()
    assert counters.waits == {}


@pytest.mark.parametrize("head", [image_classifier, image_text_classifier])
@pytest.mark.parametrize("micro", [1, 4])
def test_a_step_of_a_classifier_never_waits(head, micro, tmp_path):
    model = head(grr_coca_tiny(dropout=0.1), 3, dropout=0.1)
    body = a_run(model, CPU, tmp_path, classification_step, micro, bf16=True)
    with Counters() as counters:
        body()
    assert counters.waits == {}


@pytest.mark.parametrize(("micro", "most"), [(1, 1300), (4, 6400)])
def test_a_step_starts_no_more_operations_than_it_did(micro, most, tmp_path):
    body = a_run(grr_coca_tiny(dropout=0.1), CPU, tmp_path, global_batch_step, micro, bf16=True)
    with Counters() as counters:
        body()
    assert counters.operations.total() <= most  # 1,282 and 6,223 were counted
