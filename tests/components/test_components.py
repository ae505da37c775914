"""Rules for every primitive: docstrings, exports, initialisation, gradients, and accuracy in bfloat16."""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import grr.components
from grr.components import (
    GEGLU,
    AttentionPooler,
    AxialRotaryEmbedding,
    Block,
    ClassToken,
    CrossAttention,
    CrossAttentionPooler,
    Dropout,
    FeedForward,
    LayerNorm,
    LearnedPositions,
    LoRALinear,
    MixedRotaryEmbedding,
    PatchDropout,
    PatchEmbedding,
    RMSNorm,
    RotaryEmbedding,
    SelfAttention,
    SinusoidalPositions,
    SwiGLU,
)

AT = torch.arange(8)  # positions on one axis
GRID = torch.cartesian_prod(torch.arange(4), torch.arange(2))  # positions on two axes


def a_block() -> Block:
    return Block(
        attention_norm=RMSNorm(16),
        attention=SelfAttention(16, 2, causal=True, rotary=MixedRotaryEmbedding(8, 2), qk_norm=True),
        cross_attention_norm=LayerNorm(16),
        cross_attention=CrossAttention(16, 2, qk_norm=True),
        feed_forward_norm=RMSNorm(16),
        feed_forward=GEGLU(16, 43),
    )


def a_cross_attention_pooler() -> CrossAttentionPooler:
    attention = CrossAttention(8, 2, context_dim=16, context_norm=LayerNorm(16))
    return CrossAttentionPooler(8, 4, norm=LayerNorm(8), attention=attention)


def a_trained_adapter() -> LoRALinear:
    layer = LoRALinear(16, 24, rank=3, alpha=6)
    nn.init.normal_(layer.lora_b)  # 0 until the first step
    return layer


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)  # [b, 2, 8, 8]


# A function that builds each primitive, and one that calls it with x: [2, 8, 16].
PRIMITIVES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "RMSNorm": (lambda: RMSNorm(16), lambda m, x: m(x)),
    "LayerNorm": (lambda: LayerNorm(16), lambda m, x: m(x)),
    "FeedForward": (lambda: FeedForward(16, 64), lambda m, x: m(x)),
    "GEGLU": (lambda: GEGLU(16, 43), lambda m, x: m(x)),
    "SwiGLU": (lambda: SwiGLU(16, 43), lambda m, x: m(x)),
    "SinusoidalPositions": (lambda: SinusoidalPositions(16), lambda m, x: x + m(AT).to(x.dtype)),
    "LearnedPositions": (lambda: LearnedPositions(16, 8), lambda m, x: x + m(AT)),
    "RotaryEmbedding": (lambda: RotaryEmbedding(8), lambda m, x: m(heads(x), AT)),
    "AxialRotaryEmbedding": (lambda: AxialRotaryEmbedding(8), lambda m, x: m(heads(x), GRID)),
    "MixedRotaryEmbedding": (lambda: MixedRotaryEmbedding(8, 2), lambda m, x: m(heads(x), GRID)),
    "PatchDropout": (lambda: PatchDropout(0.0), lambda m, x: m(x, torch.arange(x.shape[1]))[0]),
    "PatchEmbedding": (lambda: PatchEmbedding(16, 4, channels=2), lambda m, x: m(x.view(2, 2, 8, 8))),
    "SelfAttention": (lambda: SelfAttention(16, 2, rotary=RotaryEmbedding(8)), lambda m, x: m(x, positions=AT)),
    "CrossAttention": (lambda: CrossAttention(16, 2), lambda m, x: m(x, x.flip(1))),
    "AttentionPooler": (lambda: AttentionPooler(16, 4, 2), lambda m, x: m(x)),
    "CrossAttentionPooler": (a_cross_attention_pooler, lambda m, x: m(x)),
    "Dropout": (lambda: Dropout(0.5).eval(), lambda m, x: m(x)),
    "LoRALinear": (a_trained_adapter, lambda m, x: m(x)),
    "ClassToken": (lambda: ClassToken(16), lambda m, x: m(x)),
    "Block": (a_block, lambda m, x: m(x, positions=GRID, context=x.flip(1))),
}
every_primitive = pytest.mark.parametrize(("make", "call"), PRIMITIVES.values(), ids=PRIMITIVES)


def test_the_list_above_names_every_primitive():
    exported = {name: getattr(grr.components, name) for name in grr.components.__all__}
    modules = {name for name, thing in exported.items() if isinstance(thing, type) and issubclass(thing, nn.Module)}
    assert set(PRIMITIVES) == modules


@every_primitive
@given(seed=st.integers(0, 999))
def test_bfloat16_is_within_a_hundredth_of_float64(make, call, seed):
    """The norm of the error is at most 1 % of the norm of the output, with weights and input rounded to bfloat16."""
    torch.manual_seed(seed)
    module, x = make().bfloat16(), torch.randn(2, 8, 16).bfloat16()
    rounded = call(module, x)
    exact = call(module.double(), x.double())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).norm() <= 0.01 * exact.norm()


@every_primitive
def test_autocast_is_within_a_hundredth_of_float32(make, call):
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 8, 16)
    exact = call(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (call(module, x).float() - exact).norm() <= 0.01 * exact.norm()


@every_primitive
def test_the_gradient_of_the_input_equals_central_differences(make, call):
    """Compare with a difference along a random direction, which includes the context of a cross-attention."""
    torch.manual_seed(0)
    module, x, direction = make().double(), torch.randn(2, 8, 16).double(), torch.randn(2, 8, 16).double()
    weights = torch.randn_like(call(module, x))
    x.requires_grad_()
    (call(module, x) * weights).sum().backward()
    step = 1e-3  # rotations are computed in float32
    with torch.no_grad():
        ahead, behind = ((call(module, x + s * direction) * weights).sum() for s in (step, -step))
    torch.testing.assert_close((x.grad * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-2, atol=1e-3)


@every_primitive
def test_every_parameter_is_initialised_by_the_module_that_owns_it(make, call):
    module = make()
    for owner in module.modules():
        own = list(owner.parameters(recurse=False))
        for parameter in own:
            nn.init.constant_(parameter, torch.nan)
        if own:
            owner.reset_parameters()
        assert all(parameter.isfinite().all() for parameter in own), type(owner).__name__


@every_primitive
def test_it_can_be_built_on_the_meta_device_and_initialised_afterwards(make, call):
    with torch.device("meta"):
        module = make()
    assert not list(module.buffers()), "a buffer would be lost on the meta device"
    module.to_empty(device="cpu")
    for owner in module.modules():
        if list(owner.parameters(recurse=False)):
            owner.reset_parameters()
    assert call(module, torch.randn(2, 8, 16)).isfinite().all()


@every_primitive
def test_gradients_reach_every_parameter_and_the_input(make, call):
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    y = call(module, x)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad.any()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@every_primitive
def test_no_parameter_is_a_scalar(make, call):
    assert all(parameter.ndim for parameter in make().parameters()), "FSDP2 cannot shard a scalar"


def test_everything_public_has_a_docstring():
    silent = []
    for info in pkgutil.iter_modules(grr.components.__path__):
        module = importlib.import_module(f"grr.components.{info.name}")
        silent += [info.name] * (not module.__doc__)
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            silent += [name] * (not thing.__doc__)
            methods = {m: f for m, f in vars(thing).items() if callable(f) and not m.startswith("_")}
            silent += [f"{name}.{m}" for m, f in methods.items() if not f.__doc__ and not hasattr(nn.Linear, m)]
    assert not silent


def test_the_folder_refuses_to_be_imported_by_its_bare_name():
    root = Path(grr.components.__file__).resolve().parents[1]
    outcome = subprocess.run(
        [sys.executable, "-c", "import components"], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert outcome.returncode == 1
    assert "ImportError: import grr.components, not components: the folder is part of the package grr" in outcome.stderr
