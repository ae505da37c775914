"""Compilation: of passes of training steps alone, a version a size, without a graph break; and where it is chosen."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from grr.components import Block, fold_in
from grr.data import Batch
from grr.data.collate import collate_captions
from grr.models.builders import grr_coca_tiny
from grr.models.coca import TextDecoder, VisionTransformer, evaluating
from grr.parallel.compiled import TOWERS
from grr.parallel.parallelize import parallelize
from grr.training.loss import contrastive_loss
from grr.training.step import global_batch_step

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")
SIZES = {"context_length": 32, "vision_layers": 1, "text_layers": 1, "multimodal_layers": 1, "dropout": 0.2}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def batch(*lengths: int) -> Batch:
    """Eight pairs, with captions of these numbers of tokens in turn."""
    rows = [[510, *range(3, 3 + n), 1, *[0] * (29 - n), 511, 0] for n in (*lengths * 8,)[:8]]
    return Batch(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), *collate_captions(rows, text_multiple=8), [""] * 8, 0)


def built(device: torch.device = CPU, **prepared: object) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("meta" if device.type == "cuda" else "cpu"):
        model = grr_coca_tiny(**SIZES)
    parallelize(model, device, **prepared)
    return model


def test_the_whole_loss_is_one_graph_a_size():
    """Forward pass with keyed dropout, contrastive loss and captioning loss; fullgraph raises at a graph break."""
    model, counter = built(), CompileCounter()

    def loss(x: Batch, keys: torch.Tensor) -> torch.Tensor:
        places = {"label_places": x.label_places, "cls_places": x.cls_places}
        out = model(x.images, x.ids, positions=x.positions, labels=x.labels, **places, sample_keys=keys)
        return contrastive_loss(out.image_embeddings, out.text_embeddings, 1 / out.scale) + out.token_losses.sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=False)
    batches = [batch(3), batch(4, 2), batch(5), batch(12), batch(11, 13)]
    for i, x in enumerate(batches):
        keys = fold_in(i, torch.arange(8))
        torch.testing.assert_close(compiled(x, keys), loss(x, keys), rtol=1e-5, atol=1e-5)
    sizes = {(x.ids.shape, x.labels.shape) for x in batches}
    assert len(sizes) == 2 < len({x.num_labels for x in batches})
    assert counter.frame_count == len(sizes)


@pytest.mark.parametrize(("bf16", "rounding"), [(False, 1e-5), (True, 2e-2)])
def test_a_step_compiles_each_tower_once_a_size_without_a_graph_break(monkeypatch, bf16, rounding):
    """Compiled code rotates and gates by the formulas, so its losses and gradients differ in rounding."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    model, eager = built(bf16=bf16, compile=True), built(bf16=bf16)
    versions = []
    for i, lengths in enumerate([(3,), (4, 2), (12,), (11, 13), (5,)]):
        micro = [batch(*lengths)] * 2
        found, expected = global_batch_step(model, micro, i).read(), global_batch_step(eager, micro, i).read()
        assert found.loss == pytest.approx(expected.loss, rel=1e-4 if bf16 else 1e-6)
        versions.append(counter.frame_count)
    # with and without a graph (GradCache): image and text towers; with one: the multimodal tower and the losses
    assert versions == [6, 6, 10, 10, 10]
    assert not counters["graph_break"]
    whole = torch.stack([q.grad.norm() for q in eager.parameters() if q.grad is not None]).norm()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad - q.grad).norm() <= rounding * (q.grad.norm() + 1e-3 * whole), name

    with evaluating(model), torch.no_grad():
        for b in (1, 2, 3):
            model.encode_image(torch.rand(b, 3, 32, 32))
    assert counter.frame_count == versions[-1]


@pytest.mark.parametrize(
    ("prepared", "compiled"),
    [
        ({}, TOWERS),
        ({"compile": True, "bf16": True}, TOWERS),
        ({"compile": True, "activation_checkpointing": True}, Block),
        ({"compile": False}, ()),
    ],
)
def test_on_a_gpu_towers_are_compiled_unless_something_works_between_their_blocks(monkeypatch, prepared, compiled):
    functions = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: functions.append((function, options)) or function)
    built(torch.device("cuda"), **prepared)
    whole = {kind.forward for kind in TOWERS} if compiled is TOWERS else {Block.forward} if compiled else set()
    parts = [(f, options) for f, options in functions if f.__qualname__.endswith(".forward")]
    assert {f for f, _ in parts} == whole
    assert all(options == {"dynamic": False} for _, options in parts)
    assert len(functions) == len(parts) + bool(whole)  # and the losses of tokens


def test_elsewhere_nothing_is_compiled_unless_it_is_wanted(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
    model = built()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_blocks_of_a_tower_of_ones_own_are_compiled(monkeypatch):
    class Encoder(nn.Module):
        def __init__(self, tower: VisionTransformer) -> None:
            super().__init__()
            self.patches, self.blocks = tower.patches, tower.blocks

    functions = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: functions.append(function) or function)
    model = grr_coca_tiny(**SIZES)
    model.vision_encoder = Encoder(model.vision_encoder)
    parallelize(model, CPU, compile=True)
    assert Block.forward in functions
    assert TextDecoder.forward in functions
    assert VisionTransformer.forward not in functions
