"""The chunked contrastive losses are the plain ones, in value and gradient, and hold no more logits than a chunk."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grr.training import contrast as module
from grr.training.contrast import Columns, contrast
from grr.training.loss import contrastive_loss, sigmoid_loss

KINDS = ["softmax", "sigmoid"]
WORKER = Path(__file__).parent / "contrast_worker.py"


def embeddings(b: int, e: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Images, texts, a scale and a bias, all with gradients, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(2, b, e, generator=generator, dtype=torch.float64), dim=-1)
    return tuple(part.requires_grad_() for part in (x[0].clone(), x[1].clone()))


def plain(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, kind: str) -> Tensor:
    return contrastive_loss(image, text, 1 / scale) if kind == "softmax" else sigmoid_loss(image, text, 1 / scale, bias)


@given(
    b=st.integers(1, 12),
    chunk=st.integers(1, 150),
    scale=st.floats(0.5, 100),
    bias=st.floats(-10, 10),
    kept=st.lists(st.booleans(), min_size=12, max_size=12),
    weight=st.floats(-2, 2),
    kind=st.sampled_from(KINDS),
    all_count=st.booleans(),
)
def test_value_and_gradients_are_those_of_the_plain_loss(b, chunk, scale, bias, kept, weight, kind, all_count):
    image, text = embeddings(b, 5, chunk)
    scale, bias = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (scale, bias))
    inputs = (image, text, scale, bias) if kind == "sigmoid" else (image, text, scale)
    chosen = torch.tensor([True, *kept[1:]])[:b]
    columns = Columns(image.detach(), text.detach(), 0, None if all_count else chosen)
    rows = slice(None) if all_count else chosen
    expected = plain(image[rows], text[rows], scale, bias, kind)
    with mock.patch.object(module, "CHUNK", chunk):
        found = contrast(image, text, scale, bias, columns, kind=kind)
        gradients = torch.autograd.grad(weight * found, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(weight * expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned, and how many are so large."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_larger_than_a_chunk(kind):
    b, e, chunk = 512, 8, 10 * 512
    image, text = embeddings(b, e)
    scale, bias = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with mock.patch.object(module, "CHUNK", chunk), Largest() as chunked:
        contrast(image, text, scale, bias, Columns(image.detach(), text.detach()), kind=kind).backward()
    with Largest() as whole:
        plain(image, text, scale, bias, kind).backward()
    assert whole.elements == b * b
    assert chunked.elements == chunk


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_compiles_as_one_graph(kind):
    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return contrast(image, text, scale, bias, Columns(image.detach(), text.detach()), kind=kind)

    image, text = embeddings(6, 4)
    scale, bias = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (image, text, scale)
    found = torch.autograd.grad(compiled(image, text, scale, bias), inputs)
    for ours, expected in zip(found, torch.autograd.grad(loss(image, text, scale, bias), inputs), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_mean_over_processes_is_the_loss_and_gradient_of_one(processes):
    done = run([str(WORKER)], processes=processes)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    rows = json.loads(lines[0].removeprefix("RESULT "))
    assert [(row["kind"], row["some"]) for row in rows] == [(kind, some) for kind in KINDS for some in (False, True)]
    for row in rows:
        assert row["loss"] < 1e-13, row
        assert row["gradients"] < 1e-13, row
        assert row["tokens"] == list(range(100, 112))
        assert row["collectives"] == (2 if row["kind"] == "softmax" else 1)  # the embeddings; the log-sum-exps
