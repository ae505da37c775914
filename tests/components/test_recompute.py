"""Layers that recompute their inputs: gradients are those of the formula, and the graph keeps what it must only."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grr.components import (
    GEGLU,
    Block,
    CrossAttention,
    DropoutKeys,
    FeedForward,
    LayerNorm,
    RMSNorm,
    RotaryEmbedding,
    Rotation,
    SelfAttention,
    SwiGLU,
    call_without_keeping,
    dropout_keys,
    recomputable,
    recompute,
)

D, HIDDEN = 16, 43


@pytest.fixture(autouse=True, scope="module")
def recompute_of_any_size():
    """Recompute in these tests what is recomputed of large tensors only, so that they can be small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "LARGE", 1)
        yield


seeds = st.integers(0, 999)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random(module: nn.Module, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    for i, parameter in enumerate(module.to(dtype).parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + i, dtype=dtype) / parameter.shape[-1] ** 0.5
    return module


def a_block(
    *, causal: bool = True, context: bool = False, norm: type[nn.Module] = RMSNorm, gated: bool = True
) -> Block:
    return Block(
        attention_norm=norm(D),
        attention=SelfAttention(D, 2, causal=causal, rotary=RotaryEmbedding(D // 2)),
        cross_attention_norm=norm(D) if context else None,
        cross_attention=CrossAttention(D, 2) if context else None,
        feed_forward_norm=norm(D),
        feed_forward=(GEGLU if gated else FeedForward)(D, HIDDEN),
        dropout=0.15,
    )


def inputs(block: Block, b: int, s: int, dtype: torch.dtype = torch.float64) -> dict[str, object]:
    """Returns the arguments of a call of the block in training, other than x."""
    at = torch.arange(s)
    context = normal(b, 3, D, seed=9, dtype=dtype) if block.cross_attention is not None else None
    keys = dropout_keys(torch.arange(b), at, 3, D)
    return {"positions": Rotation(RotaryEmbedding(D // 2).angles(at)), "context": context, "dropout_keys": keys}


def gradients(module: nn.Module, y: Tensor, x: Tensor, g: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *module.parameters()], g))


# Laws: the gradient is that of the formula


@dtypes
@pytest.mark.parametrize(("kind", "activation"), [(GEGLU, F.gelu), (SwiGLU, F.silu)])
@given(seed=seeds)
def test_gated_networks_and_their_gradients_are_those_of_the_formula(dtype, kind, activation, seed):
    module, x = random(kind(D, HIDDEN), seed, dtype), normal(2, 3, D, seed=seed, dtype=dtype).requires_grad_()
    g = normal(2, 3, D, seed=seed + 1, dtype=dtype)
    gate, value = module.up(x).chunk(2, dim=-1)
    expected, y = module.down(activation(gate) * value), module(x)
    pairs = zip(gradients(module, y, x, g), gradients(module, expected, x, g), strict=True)
    for ours, theirs in ((y, expected), *pairs):  # GELU of strided memory is rounded differently
        assert (ours - theirs).norm() <= 16 * torch.finfo(dtype).eps * theirs.norm()


@dtypes
@given(d=st.sampled_from([1, 5, 64]), eps=st.sampled_from([1e-6, 1e-2]), seed=seeds)
def test_the_gradients_of_rms_norm_are_those_of_the_formula(dtype, d, eps, seed):
    norm, x = random(RMSNorm(d, eps=eps), seed, dtype), normal(2, 3, d, seed=seed, dtype=dtype).requires_grad_()
    g, exact = normal(2, 3, d, seed=seed + 1, dtype=dtype), x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    inverse = (exact.pow(2).mean(-1, keepdim=True) + eps) ** -0.5
    expected = exact * inverse * weight
    theirs = torch.autograd.grad(expected, (exact, weight), g.double(), retain_graph=True)
    summands = (g * weight * inverse).norm(), (g * exact * inverse).abs().sum((0, 1)).norm()  # which cancel in part
    for ours, other, scale in zip(gradients(norm, norm(x), x, g), theirs, summands, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - other).norm() <= 4 * torch.finfo(dtype).eps * scale


def test_first_and_second_derivatives_equal_central_differences():
    x, weight, bias = (normal(*shape, seed=4).requires_grad_() for shape in ((3, 8), (8,), (5, 4)))
    norm = RMSNorm(8).double()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norm._parameters["weight"] = weight
        gated = recomputable(lambda both: F.gelu(both[..., :4]) * both[..., 4:], norm(x))
        return call_without_keeping(lambda y: F.linear(y, bias), gated)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@given(seed=seeds)
def test_a_block_has_the_gradients_of_its_parts_without_recomputation(context, gated, seed):
    """torch.func computes each part by its formula."""
    block, x = random(a_block(context=context, gated=gated), seed).eval(), normal(2, 4, D, seed=seed).requires_grad_()
    arguments, g = inputs(block, 2, 4), normal(2, 4, D, seed=seed + 1)
    names = dict(block.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(block, parameters, (x,), arguments) * g).sum()

    of_parameters, of_x = torch.func.grad(loss, argnums=(0, 1))({k: v.detach() for k, v in names.items()}, x.detach())
    ours = gradients(block, block(x, **arguments), x, g)
    for found, expected in zip(ours, [of_x, *(of_parameters[name] for name in names)], strict=True):
        torch.testing.assert_close(found, expected)


# What the graph keeps


def test_an_input_that_is_recomputed_is_not_kept(saved_bytes):
    linear, x = nn.Linear(8, 4), torch.randn(3, 5, 8, requires_grad=True)
    weights = (linear.weight, linear.bias, x)
    assert saved_bytes(lambda: linear(x.sin()), *weights) == x.nbytes
    assert saved_bytes(lambda: call_without_keeping(linear, recomputable(torch.sin, x)), *weights) == 0
    y = x.sin()  # of another kind of node
    torch.testing.assert_close(call_without_keeping(linear, y), linear(y), rtol=0, atol=0)


@pytest.mark.parametrize("context", [False, True])
def test_a_block_keeps_these_vectors_of_a_token(saved_bytes, context):
    """In bfloat16: d is the input of a norm, 3 d are queries, keys and values, d their output, 2 hidden the factors of
    the gated product; each mask of dropout is a byte a channel."""
    b, s = 2, 8
    block = a_block(context=context).bfloat16()
    x = normal(b, s, D, seed=0, dtype=torch.bfloat16).requires_grad_()
    arguments = inputs(block, b, s, torch.bfloat16)
    rotation = arguments["positions"]
    known = [*block.parameters(), rotation.cos, rotation.sin]
    known += [arguments["context"]] if context else []
    kept = saved_bytes(lambda: block(x, **arguments), *known)
    branches = 3 if context else 2
    vectors = branches * 2 * D + 2 * (3 * D + D) + 2 * 2 * HIDDEN + branches * D
    vectors += 2 * 2 * D if context else 0  # queries of the context and their output
    statistics = 4 * 2 * (2 if context else 1)  # the logarithms of the sums of two heads, float32
    of_context = 2 * 2 * D * 3 * b if context else 0  # keys and values of three vectors
    assert kept == b * s * (vectors + statistics) + of_context


def test_a_block_computes_in_these_kernels(kernels):
    """A forward pass: 4 products, attention, a rotation of 3, 3 a branch for dropout and the residual stream, 2 for the
    gated product, a copy of the values, and, on a CPU, a copy of the gate and several for each norm."""
    block = a_block().bfloat16()
    x = normal(2, 8, D, seed=0, dtype=torch.bfloat16).requires_grad_()
    arguments = inputs(block, 2, 8, torch.bfloat16)
    norms = sum(kernels(lambda: block.attention_norm(x)).values()) * 2
    forward = kernels(lambda: block(x, **arguments))
    assert sum(forward.values()) - norms == 4 + 1 + 3 + 2 * 3 + 2 + 1 + 1
    y = block(x, **arguments)
    backward = kernels(lambda: y.backward(y))
    assert backward["mm"] == 8  # two for each linear layer: no product is computed again
    assert backward["addmm"] == 0
    assert backward["gelu"] == 1


@pytest.mark.parametrize("context", [False, True])
def test_activation_checkpointing_keeps_the_input_only_and_has_the_same_gradients(saved_bytes, context):
    block, x = random(a_block(context=context), 0), normal(2, 4, D, seed=1).requires_grad_()
    arguments, g = inputs(block, 2, 4), normal(2, 4, D, seed=2)
    again = functools.partial(checkpoint, block, x, use_reentrant=False, **arguments)
    assert saved_bytes(again, x, *block.parameters()) == 0
    ours, theirs = (gradients(block, y, x, g) for y in (again(), block(x, **arguments)))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_graph_may_be_used_twice_and_accumulates_the_same_gradient():
    module, x = random(GEGLU(D, HIDDEN), 0), normal(3, D, seed=1).requires_grad_()
    y = module(x).square().sum()
    first, second = (torch.autograd.grad(y, (x, *module.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_linear_layer_that_was_replaced_or_hooked_is_called():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module, x, called = random(GEGLU(D, HIDDEN), 0), normal(3, D, seed=1), []
    expected = 2 * module(x)
    module.down.register_forward_pre_hook(lambda _, arguments: called.append(arguments[0].shape))
    module.down.__class__ = Doubled
    torch.testing.assert_close(module(x), expected)
    assert called == [(3, HIDDEN)]


# Compilation and torch.func


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_a_block_compiles_as_one_graph_with_the_same_gradients(context, norm):
    torch.compiler.reset()
    block, x = random(a_block(context=context, norm=norm), 0), normal(2, 4, D, seed=1).requires_grad_()
    arguments, g = inputs(block, 2, 4), normal(2, 4, D, seed=2)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    ours, theirs = (gradients(block, f(x, **arguments), x, g) for f in (compiled, block))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


def test_blocks_work_inside_torch_func():
    block, x = random(a_block(), 0).eval(), normal(3, 4, D, seed=1)
    arguments = inputs(block, 1, 4)

    def loss(x: Tensor) -> Tensor:
        return block(x[None], **arguments).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    leaf = x.clone().requires_grad_()
    sum(loss(row) for row in leaf).backward()
    torch.testing.assert_close(each, leaf.grad)


# Dropout on the residual stream


@pytest.mark.parametrize("keyed", [False, True])
def test_dropout_adds_to_the_residual_stream(keyed):
    block, x, residual = a_block(), normal(2, 4, D, seed=0).requires_grad_(), normal(2, 4, D, seed=1).requires_grad_()
    rows, columns = dropout_keys(torch.arange(2), torch.arange(4), 1, D)
    keys = DropoutKeys(rows[0], columns) if keyed else None
    torch.manual_seed(0)
    y = block.dropout(x, keys, residual=residual)
    torch.manual_seed(0)
    expected = residual + block.dropout(x, keys)
    torch.testing.assert_close(y, expected)
    g = normal(2, 4, D, seed=2)
    for ours, theirs in zip(*(torch.autograd.grad(z, (x, residual), g) for z in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert torch.equal(block.eval().dropout(x, keys, residual=residual), residual + x)


@pytest.mark.parametrize(("elements", "kept"), [(2**23 - 8, True), (2**23, False)])
def test_only_large_tensors_are_recomputed(monkeypatch, saved_bytes, elements, kept):
    monkeypatch.setattr(recompute, "LARGE", 2**23)
    layer = nn.Linear(8, 1)
    x = torch.ones(elements // 8, 8, requires_grad=True)
    seen = saved_bytes(lambda: call_without_keeping(layer, recomputable(torch.sigmoid, x)), x, layer.weight)
    assert seen == (x.nbytes if kept else 0)  # the output of the sigmoid, or nothing but x
