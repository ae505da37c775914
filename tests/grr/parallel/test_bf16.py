"""Computing in bfloat16 alone is what FSDP2 does in a group of one, and leaves the parameters as they are."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from grr.data import Batch
from grr.data.collate import collate_captions
from grr.models.builders import grr_coca_tiny
from grr.parallel.bf16 import InBFloat16, held_in_bf16
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.shard import shard_over, unsharded
from grr.training.step import global_batch_step

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")


def built(prepare, **options) -> nn.Module:
    with torch.device("meta"):
        model = grr_coca_tiny(**options)
    prepare(model)
    initialize(model, CPU, seed=0)
    return model


def alone(model: nn.Module) -> None:
    parallelize(model, CPU, bf16=True)


def in_fsdp(model: nn.Module) -> None:
    shard_over(model, init_device_mesh("cpu", (1,)), bf16=True)


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        rows = [[510, 5 + i, 9, 1, *[0] * (i % 3), 511, 0] for i in range(4)]
        rows = [row + [0] * (8 - len(row)) for row in rows]
        images = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
        result.append(Batch(images, *collate_captions(rows), [""] * 4, 0))
    return result


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    full = {n: p.grad for n, p in model.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in full.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3},
        {"tied_embeddings": True, "vision_position": "rope_mixed", "learned_temperature": True},
    ],
)
def test_losses_and_gradients_are_those_of_fsdp_bit_for_bit(options):
    ours, theirs = built(alone, **options), built(in_fsdp, **options)
    assert global_batch_step(ours, batches(2), 3).read() == global_batch_step(theirs, batches(2), 3).read()
    for (name, gradient), expected in zip(gradients(ours).items(), gradients(theirs).values(), strict=True):
        if gradient is not None:
            assert gradient.dtype == torch.float32, name
            if not options.get("tied_embeddings"):  # whose two gradients are added in bfloat16 there, in float32 here
                torch.testing.assert_close(gradient, expected, rtol=0, atol=0, msg=name)


def test_it_computes_in_bfloat16_and_not_in_float32():
    model, exact = built(alone).eval(), built(lambda model: None).eval()
    images = torch.rand(2, 3, 32, 32)
    seen = []
    model.vision_encoder.blocks[0].feed_forward.up.register_forward_hook(
        lambda m, i, o: seen.append((i[0].dtype, o.dtype))
    )
    with torch.no_grad():
        ours, theirs = model.encode_image(images), exact.encode_image(images)
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


def test_activations_computed_again_give_the_same_gradients():
    def checkpointed(model: nn.Module) -> None:
        parallelize(model, CPU, bf16=True, activation_checkpointing=True)

    kept, again = built(alone, dropout=0.2), built(checkpointed, dropout=0.2)
    assert global_batch_step(kept, batches(1), 3).read() == global_batch_step(again, batches(1), 3).read()
    for (name, gradient), expected in zip(gradients(again).items(), gradients(kept).values(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, msg=name)


class Recomputing(nn.Module):
    """A vision encoder of a user's own that computes its activations again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.up, self.down, self.reentrant = nn.Linear(3 * 32, 48), nn.Linear(48, 64), reentrant

    def _layers(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.transpose(1, 2).flatten(2)  # [b, 32, 96]
        if self.reentrant is None:
            return self._layers(rows)
        return checkpoint(self._layers, rows.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_an_encoder_that_computes_its_activations_again_reads_bfloat16_there(reentrant, count):
    models = []
    for again in (None, reentrant):
        torch.manual_seed(0)
        model = grr_coca_tiny()
        model.vision_encoder = Recomputing(again)
        alone(model)
        models.append(model)
    kept, again = models
    assert global_batch_step(kept, batches(count), 3).read() == global_batch_step(again, batches(count), 3).read()
    for (name, gradient), expected in zip(gradients(again).items(), gradients(kept).values(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-4, msg=name)
    assert {p.dtype for p in again.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_compute_nearly_the_same(checkpointed):
    def compiled(model: nn.Module) -> None:
        parallelize(model, CPU, bf16=True, compile=True, activation_checkpointing=checkpointed)

    torch.compiler.reset()
    ours, eager = built(compiled), built(alone)
    assert global_batch_step(ours, batches(2), 3).read() == pytest.approx(
        global_batch_step(eager, batches(2), 3).read(), rel=2e-3
    )
    for (name, gradient), expected in zip(gradients(ours).items(), gradients(eager).values(), strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradient.norm(), expected.norm(), rtol=0.05, atol=1e-3, msg=name)


def test_parameters_are_the_same_objects_afterwards_even_after_an_error():
    model = built(alone)
    before = dict(model.named_parameters())
    global_batch_step(model, batches(1), 0).read()
    with pytest.raises(RuntimeError):
        model.encode_image(torch.rand(2, 5, 32, 32))
    with unsharded(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    after = dict(model.named_parameters())
    assert all(before[name] is after[name] for name in before)
    assert list(model.state_dict()) == list(grr_coca_tiny().state_dict())


def test_a_parameter_that_takes_no_part_keeps_no_gradient():
    model = built(alone)
    model.encode_image(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in model.multimodal_decoder.parameters())
    assert all(p.grad is not None for p in model.vision_encoder.parameters())


def test_parameters_held_for_many_calls_give_the_same_numbers():
    model = built(alone).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.image_context(images)
        with held_in_bf16(model):
            torch.testing.assert_close(model.image_context(images), expected, rtol=0, atol=0)


def test_a_model_that_computes_in_float32_is_held_as_it_is():
    model = built(lambda model: parallelize(model, CPU))
    assert not isinstance(model.forward, InBFloat16)
    with held_in_bf16(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
