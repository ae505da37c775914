"""On a GPU: no step waits, by torch's own check; CPU, GPU, eager and compiled code compute the same; captions agree."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from grr.evaluation.classification import classification_step
from grr.generation.generate import generate
from grr.models.builders import grr_coca_tiny
from grr.models.heads import image_text_classifier
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.training.finite import FiniteCheck
from grr.training.optim import adamw, clip_gradients
from grr.training.random_batches import NumberTokenizer, random_batches
from grr.training.step import StepLosses, global_batch_step

SIZES = {"vocab_size": 512, "context_length": 16, "image_size": 32}
CPU, GPU = torch.device("cpu"), torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("process_group")]


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise an error where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("step", [global_batch_step, classification_step])
def test_a_step_does_not_wait_for_the_gpu(step, micro, compiled, tmp_path):
    model = grr_coca_tiny(dropout=0.1)
    if step is classification_step:
        model = image_text_classifier(model, 3)
    parallelize(model, GPU, bf16=True, compile=compiled)
    initialize(model, GPU, seed=0)
    optimizer, finite = adamw(model.train()), FiniteCheck(tmp_path)
    pinned = [batch.pin_memory() for batch in random_batches(micro, batch_size=4, caption_tokens=7, **SIZES)]
    classes = torch.zeros(4, dtype=torch.int64, device=GPU)

    def body() -> None:
        batches = [batch.to(GPU) for batch in pinned]
        for batch in batches:
            batch.classes = classes
        losses = step(model, batches, 0)
        finite.record(0, losses, clip_gradients(model, 1.0), batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    body()
    with no_waits():
        body()
    finite.check()


def losses_and_gradients(device: torch.device, micro: int, **parallel) -> tuple[StepLosses, dict[str, Tensor]]:
    model = grr_coca_tiny(dropout=0.1)
    parallelize(model, device, **parallel)
    initialize(model, device, seed=0)
    batches = random_batches(micro, batch_size=8 // micro, caption_tokens=7, **SIZES)
    losses = global_batch_step(model.train(), [batch.to(device) for batch in batches], 0)
    return losses, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parallel", [{"compile": False}, {"compile": True}], ids=["eager", "compiled"])
@pytest.mark.parametrize("micro", [1, 4])
def test_a_gpu_computes_the_losses_and_gradients_of_a_cpu(micro, parallel):
    expected, plain = losses_and_gradients(CPU, micro, compile=False)
    found, gradients = losses_and_gradients(GPU, micro, **parallel)
    assert found.read().loss == pytest.approx(expected.read().loss, rel=1e-4)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, plain[name], rtol=1e-2, atol=1e-4), name


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_gpu_writes_the_captions_of_a_cpu(num_beams):
    model = grr_coca_tiny()
    initialize(model, CPU, seed=0)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokenizer = NumberTokenizer(512, 16)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "num_beams": num_beams}
    on_cpu, on_gpu = [
        generate(model.to(device).eval(), images.to(device), tokenizer, **options) for device in (CPU, GPU)
    ]
    assert on_gpu == on_cpu
