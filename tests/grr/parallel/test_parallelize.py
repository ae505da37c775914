"""A prepared model is the plain one, however it is prepared; its copies; and the orders that are refused."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from parallelize_worker import OPTIONS, PAIRWISE, SUBSETS, differences, emulated_float8, expected
from programs import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from grr.models.builders import grr_coca_tiny
from grr.parallel.float8 import multiply_in_float8
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.shard import preparations, shard_over

pytestmark = pytest.mark.usefixtures("process_group")

WORKER = Path(__file__).parent / "parallelize_worker.py"
CPU = torch.device("cpu")
SIZES = {"vision_layers": 1, "text_layers": 1, "multimodal_layers": 1, "vision_ffn_multiplier": 2.5}
# Relative differences of the losses, and of each parameter's gradient, from the plain model in float64: float32 has a
# rounding of 6e-8, bfloat16 of 4e-3, e4m3 of 6e-2 and e5m2 of 1e-1.
ROUNDING = {"float32": (2e-6, 2e-5), "bf16": (1e-3, 0.04), "float8": (3e-3, 0.3)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_way_to_prepare_a_model_gives_its_losses_and_gradients(processes):
    """With dropout, two micro-batches a process, and more labelled tokens in each than a chunk of the head."""
    pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
    done = run([str(WORKER)], processes=processes, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    rows = json.loads(lines[0].removeprefix("RESULT "))
    chosen = SUBSETS if processes == 1 else [SUBSETS[i] for i in PAIRWISE]
    assert [row["options"] for row in rows] == [list(options) for options in chosen]
    for row in rows:
        assert_within_rounding(row["options"], row["losses"], row["gradients"])


@pytest.mark.parametrize("prepared", [{}, {"bf16": True}, {"bf16": True, "activation_checkpointing": True}])
def test_chunks_of_the_head_are_computed_again_with_the_weights_of_the_forward_pass(prepared, formula):
    """More labelled tokens than the head takes at once: 4,356 in a micro-batch."""
    assert_within_rounding(list(prepared), *differences(prepared, *formula))


@pytest.mark.slow
def test_with_compiled_kernels_losses_and_gradients_are_the_same(formula):
    prepared = {"bf16": True, "compile": True, "activation_checkpointing": True}
    assert_within_rounding(list(prepared), *differences(prepared, *formula))


@pytest.fixture(scope="module")
def formula(process_group) -> tuple[list[float], dict[str, torch.Tensor]]:
    return expected()


def assert_within_rounding(options: list[str], losses: float, gradients: float) -> None:
    kind = next((kind for kind in ("float8", "bf16") if kind in options), "float32")
    assert losses < ROUNDING[kind][0], options
    assert gradients < ROUNDING[kind][1], options


def built(**prepared: object) -> nn.Module:
    with torch.device("meta"):
        model = grr_coca_tiny(**SIZES)
    with emulated_float8():
        parallelize(model, CPU, **prepared)
    initialize(model, CPU, seed=0)
    return model


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without the generation of kernels."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("prepared", SUBSETS, ids=lambda options: "-".join(options) or "plain")
def test_a_deep_copy_computes_with_its_own_weights(prepared):
    if "float8" in prepared:
        pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
    model = built(**prepared)
    images, ids = torch.rand(2, 3, 32, 32), torch.tensor([[510, 7, 1, 511], [510, 8, 1, 511]])
    before = model(images, ids).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(images, ids).logits, before)
    with torch.no_grad():
        for p in other.vision_encoder.blocks.parameters():
            p.mul_(2)
    assert not torch.equal(other(images, ids).logits, before)
    assert torch.equal(model(images, ids).logits, before)
    other(images, ids).logits.square().mean().backward()
    other.embed(images, ids).text_embeddings[:, 0].sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.vision_encoder.parameters())
    assert preparations(other) == preparations(model)


def test_a_deep_copy_of_a_sharded_model_is_refused():
    model = built()
    shard_over(model, init_device_mesh("cpu", (1,)))
    with pytest.raises(Exception, match="FSDP does not support deepcopy"):
        copy.deepcopy(model)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("first", OPTIONS)
@pytest.mark.parametrize("second", [*OPTIONS, "nothing"])
def test_a_model_that_was_prepared_before_is_refused_with_the_order(first, second):
    if "float8" in (first, second):
        pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
    model = built(**{first: OPTIONS[first]})
    again = {second: OPTIONS[second]} if second in OPTIONS else {}
    with pytest.raises(ValueError, match=r"parallelize: a model is prepared once, got one that is .*; build the"):
        parallelize(model, CPU, **again)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: shard_over(model, init_device_mesh("cpu", (1,))),
        lambda model: parallelize(model, CPU, bf16=True),
    ],
)
def test_what_is_sharded_or_computes_in_bfloat16_is_not_sharded_again_nor_converted(prepare):
    model = built()
    prepare(model)
    with pytest.raises(ValueError, match="shard_over: a model is sharded once, got one that is "):
        shard_over(model, init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="parallelize: a model is prepared once"):
        parallelize(model, CPU, bf16=True)


@pytest.mark.usefixtures("quick_compile")
def test_float8_comes_before_all_else():
    pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
    with pytest.raises(ValueError, match="multiply_in_float8: comes first, got a model that is compiled"):
        multiply_in_float8(built(compile=True), CPU, emulated=True)


def test_a_model_that_needs_no_preparation_may_be_prepared_later():
    model = built()
    parallelize(model, CPU)
    assert preparations(model) == []
    parallelize(model, CPU, bf16=True, activation_checkpointing=True)
    assert preparations(model) == ["compiled, cast to bfloat16 or checkpointed"]
