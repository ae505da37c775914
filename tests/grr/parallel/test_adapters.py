"""Models with adapters in training steps: in bfloat16, sharded, over micro-batches and compiled."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from grr.checkpoint.adapters import apply_adapters, merge_adapters, trained_state
from grr.components import LoRALinear, adapter_parameters
from grr.data import Batch
from grr.data.collate import collate_captions
from grr.models.builders import grr_coca_tiny
from grr.models.tuning import tune_parts
from grr.parallel.bf16 import bf16_copies
from grr.parallel.compiled import compile_parts
from grr.parallel.float8 import multiply_in_float8
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.shard import local, shard_over
from grr.training.optim import adamw
from grr.training.step import global_batch_step

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")
SIZES = {"dim": 32, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "multimodal_layers": 1}
TOWERS = ("vision_encoder", "text_decoder", "multimodal_decoder")
POOLERS = ("generative_pooler", "contrastive_pooler")


def built(prepare=lambda model: None, *, lora=TOWERS, trained=True, **tuning: object) -> nn.Module:
    with torch.device("meta"):
        model = grr_coca_tiny(**SIZES)
    if lora:
        tune_parts(model, lora=lora, frozen=POOLERS, rank=2, **tuning)
    prepare(model)
    initialize(model, CPU, seed=0)
    if trained:
        whole = {name: p for name, p in model.named_parameters() if name.endswith("lora_b")}
        for i, p in enumerate(whole.values()):
            value = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 10
            with torch.no_grad():
                local(p).copy_(value)
    return model


def in_fsdp(model: nn.Module) -> None:
    shard_over(model, init_device_mesh("cpu", (1,)))


def in_fsdp_in_bf16(model: nn.Module) -> None:
    shard_over(model, init_device_mesh("cpu", (1,)), bf16=True)


def in_bf16(model: nn.Module) -> None:
    parallelize(model, CPU, bf16=True)


def batches(count: int, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for n in range(count):
        rows = [[510, 5 + i + n, 9, 1, *[0] * (i % 3), 511, 0] for i in range(size)]
        rows = [row + [0] * (8 - len(row)) for row in rows]
        images = torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8)
        result.append(Batch(images, *collate_captions(rows, text_multiple=8), [""] * size, 0))
    return result


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: local(p.grad) for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("prepare", [in_fsdp, in_bf16, in_fsdp_in_bf16])
def test_a_step_has_the_gradients_of_the_plain_model_and_of_adapters_alone(prepare):
    plain, model = built(), built(prepare)
    expected, found = (global_batch_step(m, batches(2), 3).read() for m in (plain, model))
    exact = prepare is in_fsdp
    assert found.loss == pytest.approx(expected.loss, rel=1e-5 if exact else 2e-2)
    ours, theirs = gradients(model), gradients(plain)
    assert ours.keys() == theirs.keys() == adapter_parameters(plain).keys()
    assert {g.dtype for g in ours.values()} == {torch.float32}
    size = max(g.norm() for g in theirs.values())
    for name, g in ours.items():
        assert (g - theirs[name]).norm() <= (1e-4 if exact else 0.1) * max(theirs[name].norm(), size / 10), name


def test_in_bfloat16_both_ways_of_computing_have_the_same_gradients_bit_for_bit():
    ours, theirs = built(in_bf16), built(in_fsdp_in_bf16)
    assert global_batch_step(ours, batches(2), 3).read() == global_batch_step(theirs, batches(2), 3).read()
    for name, g in gradients(ours).items():
        assert torch.equal(g, gradients(theirs)[name]), name


def test_in_bfloat16_a_model_begins_as_without_adapters_bit_for_bit():
    """Also where the base has a GEGLU whose inner width is padded for a GPU, and adapters keep it from being padded."""
    adapted, plain = built(in_bf16, trained=False), built(in_bf16, lora=())
    (batch,) = batches(1)
    ours, theirs = (m(batch.images, batch.ids, positions=batch.positions) for m in (adapted, plain))
    assert adapted.vision_encoder.blocks[0].feed_forward.down.in_features % 8
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.image_embeddings, theirs.image_embeddings)
    assert {x.dtype for x in bf16_copies(adapted)} == {torch.bfloat16}


@pytest.mark.parametrize("prepare", [in_fsdp, in_bf16, lambda model: None])
def test_steps_change_adapters_alone_and_the_optimizer_holds_no_other(prepare):
    model = built(prepare, trained=False)
    before = {name: local(p).detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, lr=1e-2)
    names = {p: name for name, p in model.named_parameters()}
    held = [names[p] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(adapter_parameters(model))
    losses = []
    for _ in range(4):
        losses.append(global_batch_step(model, batches(2), 3).read().loss)
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(local(p), before[name])}
    assert changed == set(held)
    assert losses[-1] < losses[0]
    assert sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.ndim) == 2 * sum(
        local(p).numel() for p in adapter_parameters(model).values()
    )


@pytest.mark.parametrize("prepare", [in_fsdp, lambda model: None])
def test_merged_and_applied_adapters_are_the_same_weights(prepare):
    plain, merged, base = built(), built(prepare), built(prepare, lora=())
    (batch,) = batches(1)
    expected = plain(batch.images, batch.ids).logits
    merged(batch.images, batch.ids)  # FSDP2 keeps whole weights from here on
    apply_adapters(base, trained_state(plain, plain.state_dict()), scale=8.0, where="here")
    merge_adapters(merged)
    for model in (merged, base):
        torch.testing.assert_close(model(batch.images, batch.ids).logits, expected, rtol=1e-4, atol=1e-5)
    weights = dict(merged.named_parameters())
    for name, p in base.named_parameters():
        torch.testing.assert_close(local(p), local(weights[name]), msg=name)


def test_adapters_of_another_model_are_refused_by_name():
    tensors = trained_state(model := built(), model.state_dict())
    name = "text_decoder.blocks.0.attention.qkv"
    wrong = {**tensors, f"{name}.lora_b": torch.zeros(5, 2), "text_decoder.norm.lora_a": torch.zeros(2, 2)}
    del wrong["multimodal_decoder.blocks.0.cross_attention.q.lora_a"]
    base = built(lora=())
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=r"apply_adapters: there does not fit the model") as error:
        apply_adapters(base, wrong, scale=8.0, where="there")
    assert f"{name}.lora_b: [5, 2] in the file, [96, 2] in the model" in str(error.value)
    assert "text_decoder.norm.lora_a: in the file, not in the model" in str(error.value)
    assert "cross_attention.q.lora_a: in the model, not in the file" in str(error.value)
    assert all(torch.equal(x, before[key]) for key, x in base.state_dict().items())


def test_the_dropout_of_adapters_is_the_same_in_both_passes_of_a_step():
    """The gradient is the derivative of the loss along a random direction, with the dropout of that seed."""
    model = built(dropout=0.3).double()
    params = list(adapter_parameters(model).values())
    torch.manual_seed(0)
    directions = [torch.randn_like(p) for p in params]
    global_batch_step(model, batches(2), 3)
    slope = sum((p.grad * d).sum() for p, d in zip(params, directions, strict=True)).item()
    step, ends = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(params, directions, strict=True):
                p.add_(d, alpha=sign * step)
        ends.append(global_batch_step(model, batches(2), 3).read().loss)
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
    assert global_batch_step(model, batches(2), 4).read().loss != ends[1]


def test_float8_leaves_layers_with_adapters_as_they_are():
    pytest.importorskip("torchao.float8", reason='pip install "grr-coca[quantize]"')
    model = built(lora=("text_decoder",))
    multiply_in_float8(model, CPU, emulated=True)
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 4
    assert any(type(m).__name__ == "Float8Linear" for m in model.multimodal_decoder.modules())
    global_batch_step(model, batches(1), 3)
    assert {name.split(".")[0] for name in gradients(model)} == {"text_decoder", "vision_encoder", "multimodal_decoder"}


@pytest.mark.slow
def test_compiled_passes_draw_the_dropout_of_adapters_as_eager_ones_do():
    """Both passes of GradCache, without and with a graph, which are compiled apart."""
    block = built(dropout=0.3).text_decoder.blocks[0]
    compiled = copy.deepcopy(block)
    torch.compiler.reset()
    compile_parts(nn.Sequential(compiled), whole_towers=False)
    x, at = torch.randn(3, 8, 32), torch.arange(8)
    for graph in (False, True):
        outputs = []
        for module in (block, compiled):
            torch.manual_seed(3)
            with torch.set_grad_enabled(graph):
                outputs.append(module(x, positions=at))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
