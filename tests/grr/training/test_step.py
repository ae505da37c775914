"""The losses and gradients of a step depend on the global batch alone."""

import functools
import json
from pathlib import Path

import programs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grr.data import Batch
from grr.data.collate import IGNORE, collate_captions
from grr.models.builders import grr_coca_tiny
from grr.training.loss import captioning_loss, contrastive_loss, sigmoid_loss
from grr.training.step import evaluation_losses, global_batch_step

pytestmark = pytest.mark.usefixtures("process_group")

WORKER = Path(__file__).parent / "step_worker.py"
TOLERANCE = 2e-5  # relative, of losses and of every parameter's gradient norm, over five steps in float32


def pairs(count: int, seed: int) -> tuple[torch.Tensor, list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, 14, (count,), generator=generator).tolist()
    tokens = [torch.randint(3, 510, (n,), generator=generator).tolist() for n in lengths]
    return images, [[510, *t, 1, *[0] * (13 - len(t)), 511, 0] for t in tokens]


def split(images: torch.Tensor, rows: list[list[int]], pieces: int) -> list[Batch]:
    size = len(rows) // pieces
    cuts = [slice(i * size, (i + 1) * size) for i in range(pieces)]
    return [Batch(images[c], *collate_captions(rows[c]), [str(i) for i in range(size)], 0) for c in cuts]


@settings(max_examples=15)
@given(
    pieces=st.sampled_from([1, 2, 4]),
    contrastive=st.sampled_from(["softmax", "sigmoid"]),
    seed=st.integers(0, 99),
    learned=st.booleans(),
)
def test_any_split_has_the_losses_and_gradients_of_the_whole_batch(pieces, contrastive, seed, learned):
    torch.manual_seed(seed)
    model = grr_coca_tiny(learned_temperature=learned, logit_bias=-1.0).double()
    images, rows = pairs(8, seed)
    whole = torch.tensor(rows)
    labels = whole[:, 1:].masked_fill((whole[:, 1:] == 0) | (whole[:, 1:] == 511), IGNORE)
    output = model(images, whole[:, :-1])
    if contrastive == "softmax":
        contrast = contrastive_loss(output.image_embeddings, output.text_embeddings, 1 / output.scale)
    else:
        contrast = sigmoid_loss(output.image_embeddings, output.text_embeddings, 1 / output.scale, output.bias)
    caption = captioning_loss(output.logits, labels)
    loss = 2 * contrast + caption
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    losses = global_batch_step(model, split(images, rows, pieces), 0, contrastive=contrastive).read()
    assert losses == pytest.approx((loss.item(), contrast.item(), caption.item(), 8, 2.0, 1.0), rel=1e-5)
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_dropout_is_the_same_in_both_passes():
    """If the second pass drew other numbers, the carried gradients would belong to another function."""
    torch.manual_seed(0)
    model = grr_coca_tiny(dropout=0.5).double()
    batches = split(*pairs(8, 0), 2)
    drawn = []
    embed, forward = model.embed, model.forward
    model.embed = lambda *a, **k: drawn.append(embed(*a, **k)) or drawn[-1]
    model.forward = lambda *a, **k: drawn.append(forward(*a, **k)) or drawn[-1]
    global_batch_step(model, batches, 0).read()
    first, second = drawn[:2], drawn[2:]
    assert not torch.equal(first[0].image_embeddings[0], first[1].image_embeddings[0])
    for once, again in zip(first, second, strict=True):
        torch.testing.assert_close(once.image_embeddings, again.image_embeddings, rtol=0, atol=0)
        torch.testing.assert_close(once.text_embeddings, again.text_embeddings, rtol=0, atol=0)


def test_the_seed_decides_the_dropout():
    torch.manual_seed(0)
    model = grr_coca_tiny(dropout=0.5).double()
    batches = split(*pairs(8, 0), 1)
    assert global_batch_step(model, batches, 1).read() == global_batch_step(model, batches, 1).read()
    assert global_batch_step(model, batches, 1).read() != global_batch_step(model, batches, 2).read()


def test_local_negatives_are_the_mean_over_micro_batches_and_an_easier_task():
    torch.manual_seed(0)
    model = grr_coca_tiny().double()
    images, rows = pairs(8, 0)
    local = global_batch_step(model, split(images, rows, 2), 0, negatives="local").read()
    halves = [global_batch_step(model, split(images[h], rows[h], 1), 0).read() for h in (slice(0, 4), slice(4, 8))]
    assert local.contrastive_loss == pytest.approx(sum(h.contrastive_loss for h in halves) / 2)
    assert local.contrastive_loss < global_batch_step(model, split(images, rows, 2), 0).read().contrastive_loss


@pytest.mark.parametrize("negatives", ["global", "local"])
def test_evaluation_returns_the_losses_of_a_step_without_gradients(negatives):
    torch.manual_seed(0)
    model = grr_coca_tiny().double()
    batches = split(*pairs(8, 0), 2)
    evaluated = evaluation_losses(model, [batches], negatives=negatives)
    assert all(p.grad is None for p in model.parameters())
    assert evaluated == pytest.approx(global_batch_step(model, batches, 0, negatives=negatives).read())


def test_an_evaluation_is_without_dropout_and_leaves_the_model_in_training_mode():
    torch.manual_seed(0)
    model, plain = grr_coca_tiny(dropout=0.5).double(), grr_coca_tiny().double()
    plain.load_state_dict(model.state_dict())
    batches = split(*pairs(8, 0), 2)
    assert evaluation_losses(model, [batches]) == evaluation_losses(plain, [batches])
    assert all(module.training for module in model.modules())
    assert global_batch_step(model, batches, 0).read() != global_batch_step(plain, batches, 0).read()


def test_the_captioning_loss_of_an_evaluation_is_the_mean_over_all_tokens():
    torch.manual_seed(0)
    model = grr_coca_tiny().double()
    images, rows = pairs(8, 0)
    whole = evaluation_losses(model, [split(images, rows, 1)]).captioning_loss
    parts = evaluation_losses(model, [split(images[:2], rows[:2], 1), split(images[2:], rows[2:], 1)]).captioning_loss
    assert parts == pytest.approx(whole, rel=1e-5)


@functools.cache
def run(processes: int, **arguments: object) -> dict:
    done = programs.run([str(WORKER), json.dumps(arguments)], processes=processes)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def assert_same(one: dict, other: dict, tolerance: float = TOLERANCE) -> None:
    for a, b in zip(one["steps"], other["steps"], strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=tolerance)
        assert a["gradients"] == pytest.approx(b["gradients"], rel=50 * tolerance, abs=tolerance)
    assert one["validation"] == pytest.approx(other["validation"], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (1, {"micro": 4}),
        (2, {"micro": 1}),
        (2, {"micro": 2}),
        (4, {"micro": 1}),
        (4, {"micro": 1, "dp_replicate": 2}),
        (1, {"micro": 1, "checkpointed": True}),
    ],
)
def test_five_steps_are_the_same_on_any_number_of_processes(processes, arguments):
    assert_same(run(processes, **arguments), run(1, micro=1))


@pytest.mark.slow
def test_four_processes_draw_the_dropout_of_one_process_with_one_micro_batch():
    assert_same(run(4, micro=2, dropout=0.2), run(1, micro=1, dropout=0.2))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_bfloat16_stays_near_float32(processes):
    assert_same(run(processes, micro=1, bf16=True, steps=1), run(1, micro=1, steps=1), tolerance=2e-3)


def test_an_encoder_without_keys_draws_the_same_dropout_in_both_passes():
    torch.manual_seed(0)
    model = grr_coca_tiny(dropout=0.5)
    model.vision_encoder = encoder = nn.Sequential(nn.Flatten(2), nn.Linear(32 * 32, 64), nn.Dropout(0.5))
    model = model.double()
    batches = split(*pairs(8, 0), 2)
    drawn = []
    encoder.register_forward_hook(lambda module, inputs, output: drawn.append(output.detach()))
    assert global_batch_step(model, batches, 0).read() == global_batch_step(model, batches, 0).read()
    assert len(drawn) == 8
    for once, again in zip(drawn[:2], drawn[2:4], strict=True):
        assert torch.equal(once, again)
    assert not torch.equal(drawn[0][0] == 0, drawn[1][0] == 0)
