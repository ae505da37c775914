"""Computing in bfloat16 alone is what FSDP2 does in a group of one, and leaves the parameters as they are."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grr.data import Batch
from grr.data.collate import collate_captions
from grr.models.builders import grr_coca_tiny
from grr.models.head import token_losses
from grr.models.tuning import freeze
from grr.parallel.bf16 import InBFloat16, held_in_bf16, recomputing
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.shard import shard_over, unsharded
from grr.training.ema import EMA
from grr.training.optim import adamw
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
def test_compiled_blocks_compute_nearly_the_same():
    def compiled(model: nn.Module) -> None:
        parallelize(model, CPU, bf16=True, compile=True)

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


class Operations(TorchDispatchMode):
    """Counts operations by name, and the products with a side that is not a multiple of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.uneven: list[tuple[torch.Size, torch.Size]] = []
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.count[name] += 1
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.products += 1
            if any(side % 8 for side in (*left.shape[-2:], right.shape[-1])):
                self.uneven.append((left.shape, right.shape))
        return function(*args, **kwargs or {})


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def a_fused_step(model: nn.Module) -> None:
    model.encode_image(torch.rand(2, 3, 32, 32)).sum().backward()
    adamw(model, lr=1e-2).step()


def with_the_mean_applied(model: nn.Module) -> None:
    ema = EMA(model, decay=0.5)
    for p in model.parameters():
        p.detach().mul_(2)
    with ema.applied():
        output(model)


def other_memory(model: nn.Module) -> None:
    nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(model.parameters()), model.parameters())


def other_parameters(model: nn.Module) -> None:
    layer = model.vision_encoder.blocks[0].attention.out
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def begun_anew(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    initialize(model, CPU, seed=5)


@pytest.mark.parametrize(
    "change",
    [
        a_fused_step,
        with_the_mean_applied,
        other_memory,
        other_parameters,
        begun_anew,
        lambda model: model.load_state_dict({name: 2 * x for name, x in model.state_dict().items()}),
        lambda model: torch._foreach_mul_([p.detach() for p in model.parameters()], 2.0),
    ],
)
def test_the_copies_are_those_of_the_present_weights(change):
    model, fresh = built(alone), built(lambda model: None)
    before = output(model)
    change(model)
    fresh.load_state_dict(model.state_dict())
    alone(fresh)
    assert not torch.equal(output(model), before)
    torch.testing.assert_close(output(model), output(fresh), rtol=0, atol=0)


def test_weights_that_did_not_change_are_not_copied_again():
    model = built(alone)
    output(model)
    with Operations() as operations:
        output(model)
        global_batch_step(model, batches(3), 0)
    assert operations.count["_foreach_copy_"] == 3  # each backward pass casts its gradients by one
    with torch.no_grad():
        model.vision_encoder.blocks[0].attention.out.weight.mul_(2)
    with Operations() as operations:
        output(model)
    assert operations.count["_foreach_copy_"] == 1


def test_weights_that_changed_before_the_backward_pass_are_an_error_and_no_wrong_gradient():
    model = built(alone)
    loss = model.encode_image(torch.rand(2, 3, 32, 32)).sum()
    with torch.no_grad():
        model.vision_encoder.blocks[0].attention.out.weight.mul_(2)
    output(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", [{}, {"tied_embeddings": True}, {"vocab_size": 518, "vision_ffn_multiplier": 2.7}])
@pytest.mark.parametrize("context", [recomputing, lambda model: nullcontext()])
def test_gradients_of_micro_batches_are_added_in_float32(options, context):
    micro = batches(3)

    def gradients_of(some: list[Batch]) -> list[torch.Tensor]:
        model = built(alone, **options)
        for batch in some:
            loss = forward(model, batch)
            with context(model):
                loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together, single = gradients_of(micro), [gradients_of([batch]) for batch in micro]
    assert {g.dtype for g in together} == {torch.float32}
    for found, parts in zip(together, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(found, parts[0] + parts[1] + parts[2], rtol=1e-6, atol=1e-8)


def forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    out = model(batch.images, batch.ids, positions=batch.positions)
    return out.logits.square().mean() + out.image_embeddings[:, 0].sum() + out.text_embeddings[:, 0].sum()


def test_a_further_micro_batch_adds_and_casts_its_gradients_by_a_few_operations():
    """Whatever the number of parameters: float32 sums and casts of single gradients would be hundreds."""
    model, counts = built(alone), []
    for batch in batches(2):
        loss = forward(model, batch)
        with Operations() as operations, recomputing(model):
            loss.backward()
        counts.append(operations.count)
    first, further = counts
    assert first["_foreach_copy_"] == 1
    assert further - first == Counter({"_foreach_add_": 1})
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_many_gradients_are_cast_a_group_at_a_time(monkeypatch):
    whole, grouped = built(alone), built(alone)
    global_batch_step(whole, batches(2), 0)
    monkeypatch.setattr("grr.parallel.bf16.GROUP", 10_000)
    with Operations() as operations:
        global_batch_step(grouped, batches(2), 0)
    assert operations.count["_foreach_add_"] > 5
    for p, q in zip(whole.parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


def test_each_group_of_weights_has_a_node_that_frees_its_gradients_in_bfloat16(monkeypatch):
    monkeypatch.setattr("grr.parallel.bf16.GROUP", 10_000)
    model = built(alone)
    nodes = {node for node in graph(forward(model, *batches(1)).grad_fn) if node.name() == "_LoweredBackward"}
    parameters = [[edge.variable for edge, _ in node.next_functions if edge is not None] for node in nodes]
    assert len(nodes) > 5
    assert Counter(p for group in parameters for p in group) == Counter(model.parameters())  # each in one group
    for group in parameters:
        assert sum(p.numel() for p in group[:-1]) < 10_000  # the last one may exceed it


def graph(node):
    """Returns all nodes of an autograd graph."""
    seen, rest = set(), [node]
    while rest:
        if (node := rest.pop()) is not None and node not in seen:
            seen.add(node)
            rest += [following for following, _ in node.next_functions]
    return seen


def test_hooks_of_a_parameter_see_the_gradient_of_each_micro_batch():
    model, plain = built(alone), built(alone)
    seen, sums = [], []
    weight = model.vision_encoder.blocks[0].attention.out.weight
    weight.register_hook(lambda g: seen.append(g.clone()))
    weight.register_post_accumulate_grad_hook(lambda p: sums.append(p.grad.clone()))
    for m in (model, plain):
        for batch in batches(2):
            loss = forward(m, batch)
            with recomputing(m):
                loss.backward()
    assert len(seen) == len(sums) == 2
    torch.testing.assert_close(seen[0] + seen[1], weight.grad, rtol=0, atol=0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


def test_autograd_grad_returns_gradients_and_leaves_grad_alone():
    model = built(alone)
    weights = list(model.vision_encoder.parameters())
    found = torch.autograd.grad(forward(model, batches(1)[0]), weights)
    assert all(p.grad is None for p in model.parameters())
    forward(model, batches(1)[0]).backward()
    for p, g in zip(weights, found, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)


def test_no_gradient_of_a_frozen_weight_is_computed():
    model, frozen = built(alone), built(alone)
    freeze(frozen, frozen=("vision_encoder", "text_decoder"))
    counts = []
    for m in (model, frozen):
        with Operations() as operations:
            global_batch_step(m, batches(1), 0)
        counts.append(operations.count["mm"])
    assert counts[1] < 0.6 * counts[0]
    assert {name.split(".")[0] for name, p in frozen.named_parameters() if p.grad is None} == {
        "vision_encoder",
        "text_decoder",
    }
    for (name, p), q in zip(frozen.named_parameters(), model.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, msg=name)


ODD = {"vocab_size": 509, "vision_ffn_multiplier": 2.7, "dropout": 0.2}  # 2.7 * 64 = 172


@pytest.mark.parametrize("count", [1, 2])
def test_padded_products_have_even_sides_and_the_same_losses_and_gradients(monkeypatch, count):
    def rows(tokens: int) -> list[list[int]]:
        return [[506, 5 + i, *range(9, 9 + tokens), 1, 507, 0] for i in range(8)]

    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    micro = [Batch(images, *collate_captions(rows(4)), [""] * 8, 0) for _ in range(count)]  # 8 tokens with BOS to CLS
    ours = built(alone, **ODD)
    with Operations() as operations:
        found = global_batch_step(ours, micro, 3)
    assert operations.products > 100
    assert operations.uneven == []

    monkeypatch.setattr("grr.parallel.bf16.layouts", lambda model: {})
    monkeypatch.setattr("grr.models.head.aligned", lambda width: width)
    plain = built(alone, **ODD)
    with Operations() as operations:
        expected = global_batch_step(plain, micro, 3)
    assert len(operations.uneven) > 5
    assert found.read()[:3] == pytest.approx(expected.read()[:3], rel=1e-3)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in plain.state_dict().items()}
    for (name, gradient), other in zip(gradients(ours).items(), gradients(plain).values(), strict=True):
        if other is not None:
            torch.testing.assert_close(gradient, other, rtol=0.02, atol=0.02 * other.abs().max().item(), msg=name)


@pytest.mark.parametrize("bias", [True, False])
def test_tokens_that_only_padding_adds_have_probability_0(bias):
    torch.manual_seed(0)
    head = nn.Linear(16, 509, bias=bias).bfloat16()
    with torch.no_grad():
        head.weight.copy_(-3 * torch.rand(509, 16))  # logits near -12: one of 0 that is not masked would outweigh all
    hidden, targets = torch.rand(7, 16).bfloat16().requires_grad_(), torch.arange(7)
    losses = token_losses(hidden, targets, head)
    expected = nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    losses.sum().backward()
    assert head.weight.grad.shape == (509, 16)
    assert all(p.grad.isfinite().all() for p in head.parameters())
