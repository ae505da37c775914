"""Low-rank adapters: their laws, the formula in float64, and quantised weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grr.components import GEGLU, Block, FeedForward, LoRALinear, RMSNorm, SelfAttention, adapter_parameters

sizes = st.integers(1, 24)


@st.composite
def layers(draw, dtype=torch.float64, dropout=0.0):
    """A linear layer, and a trained adapter on a copy of it."""
    torch.manual_seed(draw(st.integers(0, 999)))
    linear = nn.Linear(draw(sizes), draw(sizes), bias=draw(st.booleans())).to(dtype)
    rank = draw(st.integers(1, min(linear.weight.shape)))
    alpha = draw(st.sampled_from([0.5, 1.0, 16.0]))
    layer = LoRALinear.from_linear(copy.deepcopy(linear), rank=rank, alpha=alpha, dropout=dropout)
    return linear, layer


def trained(layer: LoRALinear) -> LoRALinear:
    nn.init.normal_(layer.lora_b)
    return layer


@given(drawn=layers())
def test_the_matrix_rank_of_the_update_is_at_most_the_rank(drawn):
    _, layer = drawn
    assert torch.linalg.matrix_rank(layer.update()) == 0
    assert torch.linalg.matrix_rank(trained(layer).update(), rtol=1e-9) <= layer.rank


@given(drawn=layers(torch.float32), rows=st.integers(1, 5))
def test_it_begins_as_the_linear_layer_bit_for_bit(drawn, rows):
    linear, layer = drawn
    x = torch.randn(rows, linear.in_features)
    assert layer.lora_a.any()
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16()), linear.bfloat16()(x.bfloat16()), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@given(data=st.data())
def test_merged_equals_unmerged(dtype, tolerance, data):
    linear, layer = data.draw(layers(dtype))
    x = torch.randn(2, 3, linear.in_features, dtype=dtype)
    trained(layer)
    before, a = layer(x), layer.lora_a.clone()
    weight = linear.weight + layer.update()
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer(x), F.linear(x, weight, linear.bias), rtol=tolerance, atol=tolerance)
    assert not layer.lora_b.any()
    assert torch.equal(layer.lora_a, a)


@given(drawn=layers())
def test_values_and_gradients_are_those_of_the_formula(drawn):
    """y = x W^T + b + alpha / r x A^T B^T, written out with matrices and differentiated by hand."""
    linear, layer = drawn
    trained(layer)
    x = torch.randn(3, linear.in_features, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, linear.out_features, dtype=torch.float64)
    y = layer(x)
    y.backward(g)
    a, b, w, s = layer.lora_a.detach(), layer.lora_b.detach(), linear.weight.detach(), layer.alpha / layer.rank
    bias = 0 if linear.bias is None else linear.bias.detach()
    expected = {
        "y": (y, x.detach() @ w.T + bias + s * (x.detach() @ a.T) @ b.T),
        "x": (x.grad, g @ w + s * (g @ b) @ a),
        "a": (layer.lora_a.grad, s * (g @ b).T @ x.detach()),
        "b": (layer.lora_b.grad, s * g.T @ (x.detach() @ a.T)),
    }
    for name, (ours, theirs) in expected.items():
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@given(drawn=layers())
def test_gradients_reach_the_adapter_alone(drawn):
    _, layer = drawn
    layer(torch.randn(2, layer.in_features, dtype=torch.float64)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_a", "lora_b"}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    assert not layer.lora_a.grad.any()  # because B is 0
    assert layer.lora_b.grad.any()


@given(drawn=layers())
def test_it_has_rank_times_both_sides_more_parameters(drawn):
    linear, layer = drawn
    added = adapter_parameters(layer)
    assert list(added) == ["lora_a", "lora_b"]
    extra = layer.rank * (linear.in_features + linear.out_features)
    assert sum(p.numel() for p in added.values()) == extra
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in linear.parameters()) + extra


def test_it_takes_the_parameters_of_the_linear_layer_and_does_not_copy_them():
    linear = nn.Linear(4, 6)
    layer = LoRALinear.from_linear(linear, rank=2, alpha=4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.state_dict().keys() == linear.state_dict().keys() | {"lora_a", "lora_b"}
    assert layer.lora_a.dtype == torch.float32
    assert LoRALinear.from_linear(nn.Linear(4, 6).bfloat16(), rank=2, alpha=4).lora_b.dtype == torch.bfloat16


def test_dropout_is_applied_to_the_input_of_the_update_in_training_alone():
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False).double()
    layer = trained(LoRALinear.from_linear(linear, rank=2, alpha=4, dropout=0.25))
    x = torch.randn(5, 64).double()
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones(5, 64).double(), 0.25)
    assert 0 < (mask == 0).sum() < mask.numel() / 2
    torch.testing.assert_close(y, linear(x) + (x * mask) @ layer.update().T)
    torch.testing.assert_close(layer.eval()(x), linear(x) + x @ layer.update().T)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rank": 0}, r"rank must be from 1 to the shorter side of the matrix, got rank=0 for 6 x 4"),
        ({"rank": 5}, r"rank must be from 1 to the shorter side of the matrix, got rank=5 for 6 x 4"),
        ({"rank": 2, "alpha": 0.0}, r"alpha must be above 0 and finite.*got alpha=0.0, dropout=0.0"),
        ({"rank": 2, "dropout": 1.0}, r"alpha must be .*, dropout from 0 to below 1, got alpha=1.0, dropout=1.0"),
    ],
)
def test_numbers_out_of_range_are_named(options, what):
    with pytest.raises(ValueError, match=f"LoRALinear: {what}"):
        LoRALinear(4, 6, **{"alpha": 1.0, **options})


def adapted(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        parent, _, key = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, key, trained(LoRALinear.from_linear(getattr(owner, key), rank=2, alpha=4)))
    return module


@pytest.mark.parametrize("make", [FeedForward, GEGLU])
@pytest.mark.parametrize("large", [False, True], ids=["small", "recomputed"])
def test_a_block_reads_its_layers_through_their_adapters(make, large, monkeypatch):
    """Also where inputs are computed again for the gradient instead of being kept."""
    if large:
        monkeypatch.setattr("grr.components.recompute.LARGE", 1)
    torch.manual_seed(0)
    parts = {"attention_norm": RMSNorm(16), "attention": SelfAttention(16, 2), "feed_forward_norm": RMSNorm(16)}
    block = Block(**parts, feed_forward=make(16, 24)).double()
    names = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    layers = adapted(copy.deepcopy(block), *names)
    for name in names:
        linear = block.get_submodule(name)
        linear.weight = nn.Parameter(linear.weight.detach() + layers.get_submodule(name).update().detach())
    x = torch.randn(2, 5, 16).double()
    theirs, ours = block(x), layers(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    g = torch.randn_like(ours)
    ours.backward(g)
    theirs.backward(g)
    for name in names:  # the chain rule from the gradient of the merged weight
        layer, of_weight = layers.get_submodule(name), block.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_b.grad, layer.scale * of_weight @ layer.lora_a.T)
        torch.testing.assert_close(layer.lora_a.grad, layer.scale * layer.lora_b.T @ of_weight)
        assert layer.weight.grad is None


# --- quantised weights -----------------------------------------------------------------------------------------------


def quantized(linear: nn.Linear, config: str, **options: object) -> nn.Linear:
    torchao = pytest.importorskip("torchao.quantization", reason='pip install "grr-coca[quantize]"')
    whole = nn.Sequential(linear)
    torchao.quantize_(whole, getattr(torchao, config)(set_inductor_config=False, version=2, **options))
    return whole[0]


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_quantised_weight_passes_gradients_to_the_adapter_and_to_the_input(config):
    torch.manual_seed(0)
    linear = quantized(nn.Linear(32, 48), config)
    exact = linear.weight.dequantize().double()
    layer = LoRALinear.from_linear(linear, rank=4, alpha=8)
    x = torch.randn(3, 32, requires_grad=True)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    trained(layer)
    g = torch.randn(3, 48)
    layer(x).backward(g)
    torch.testing.assert_close(x.grad.double(), g.double() @ (exact + layer.update().double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_b.grad, layer.scale * g.T @ (x.detach() @ layer.lora_a.T))
    with pytest.raises(ValueError, match=r"LoRALinear: an update is added to a matrix of numbers, got a \w+8Tensor"):
        layer.merge()


def test_a_quantised_weight_that_stops_gradients_is_refused():
    linear = quantized(nn.Linear(32, 48), "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(ValueError, match=r"gradients must pass through the weight, got a Int8Tensor that stops them"):
        LoRALinear.from_linear(linear, rank=4, alpha=8)
