"""Products in float8: what they compute, which they are, and that nothing else changes."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallelize_worker import emulated_float8
from torch import Tensor, nn

from grr.checkpoint.model_folder import save_model
from grr.checkpoint.training_state import load_checkpoint, save_checkpoint
from grr.components import Block
from grr.inference.pretrained import describe
from grr.models.builders import grr_coca_tiny
from grr.parallel.float8 import multiply_in_float8
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.training.loss import contrastive_loss
from grr.training.optim import adamw

pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
CPU = torch.device("cpu")
SIZES = {"vision_layers": 1, "text_layers": 1, "multimodal_layers": 1, "vision_ffn_multiplier": 2.5}  # 2.5 * 64 = 160


def a_model(*, float8: bool, **changes) -> nn.Module:
    with torch.device("meta"):
        model = grr_coca_tiny(**SIZES | changes)
    if float8:
        multiply_in_float8(model, CPU, emulated=True)
    initialize(model, CPU, seed=0)
    return model


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest number of a format whose largest is that of x."""
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return (x.double() * scale).float().to(dtype).double() / scale


def trained(model: nn.Module, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(3, 510, (8, 11), generator=generator)  # 88 tokens: no multiple of 16
    optimizer = adamw(model, lr=1e-3)
    losses = []
    for _ in range(steps):
        output = model(images, ids)
        contrast = contrastive_loss(output.image_embeddings, output.text_embeddings)
        loss = contrast + nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class OneLayer(nn.Module):
    """A block whose feed-forward network is a single layer."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        identity = nn.Identity()
        self.block = Block(
            attention_norm=identity,
            attention=identity,
            feed_forward_norm=identity,
            feed_forward=nn.Linear(columns, rows),
        )


@given(
    tokens=st.integers(1, 40),
    columns=st.integers(1, 6),
    rows=st.integers(1, 6),
    log_scale=st.integers(-3, 3),
    seed=st.integers(0, 99),
)
def test_a_product_is_that_of_numbers_of_8_bits_both_ways(tokens, columns, rows, log_scale, seed):
    model = OneLayer(16 * columns, 16 * rows)
    multiply_in_float8(model, CPU, emulated=True)
    layer = model.block.feed_forward
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, 16 * columns, generator=generator) * 10.0**log_scale).requires_grad_()
    gradient = torch.randn(tokens, 16 * rows, generator=generator) / 10.0**log_scale
    y = layer(x)
    y.backward(gradient)
    x8, w8 = rounded(x.detach(), torch.float8_e4m3fn), rounded(layer.weight.detach(), torch.float8_e4m3fn)
    g8 = rounded(gradient, torch.float8_e5m2)
    for found, expected, size in (
        (y - layer.bias, x8 @ w8.T, x8.abs() @ w8.abs().T),
        (x.grad, g8 @ w8, g8.abs() @ w8.abs()),
        (layer.weight.grad, g8.T @ x8, g8.abs().T @ x8.abs()),
    ):
        assert ((found - expected).abs() <= 1e-5 * size + 1e-6 * y.abs().max()).all()
    torch.testing.assert_close(layer.bias.grad, gradient.sum(0))


def test_the_blocks_layers_with_even_sides_multiply_so_and_no_others():
    model, uneven = a_model(float8=True), a_model(float8=True, vision_ffn_multiplier=2.7)  # 2.7 * 64 = 172
    plain = a_model(float8=False)
    inside = {
        f"{name}.{inner}"
        for name, block in plain.named_modules()
        if isinstance(block, Block)
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    layers = {name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    changed = {name for name, layer in model.named_modules() if type(layer) is not type(plain.get_submodule(name))}
    assert changed == inside < layers
    assert not any("pooler" in name or "head" in name for name in changed)
    here = {name for name, layer in uneven.named_modules() if type(layer) is not type(plain.get_submodule(name))}
    assert inside - here == {f"vision_encoder.blocks.0.feed_forward.{name}" for name in ("up", "down")}


def test_a_model_begins_with_the_same_weights_and_learns_as_without():
    models = [a_model(float8=float8) for float8 in (False, True)]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)
    exact, ours = (trained(model, 40) for model in models)
    assert exact != ours
    assert exact[-1] < 0.7 * exact[0]
    assert ours[:10] == pytest.approx(exact[:10], rel=0.02)
    assert exact[0] - ours[-1] == pytest.approx(exact[0] - exact[-1], rel=0.1)


def test_activations_computed_again_are_rounded_alike():
    models = [a_model(float8=False) for _ in range(2)]
    with emulated_float8():
        for model, again in zip(models, (False, True), strict=True):
            parallelize(model, CPU, float8=True, activation_checkpointing=again)
    assert trained(models[0], 3) == trained(models[1], 3)


def test_checkpoints_and_model_folders_do_not_know_of_it(tmp_path):
    model = a_model(float8=True)
    optimizer = adamw(model)
    trained(model, 2)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    plain = a_model(float8=False)
    load_checkpoint(path, plain, adamw(plain))
    assert [(name, p.dtype) for name, p in plain.named_parameters()] == [
        (name, p.dtype) for name, p in model.named_parameters()
    ]
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    for name, it in {"float8": model, "plain": plain}.items():
        save_model(tmp_path / name, it, describe("grr_coca_tiny", SIZES, "squash"), None)
    assert sorted(p.name for p in (tmp_path / "float8").iterdir()) == ["config.json", "model.safetensors"]
    for file in (tmp_path / "float8").iterdir():
        assert file.read_bytes() == (tmp_path / "plain" / file.name).read_bytes()


def test_where_the_hardware_cannot_the_remedy_is_told():
    with pytest.raises(
        ValueError, match=r"needs a CUDA GPU of compute capability 8\.9 or more.*, got cpu; set parallel\.fl"
    ):
        multiply_in_float8(grr_coca_tiny(), CPU)


def test_an_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"got compute capability \(8, 0\); set parallel\.float8=false"):
        multiply_in_float8(grr_coca_tiny(), torch.device("cuda"))


def test_widths_that_none_can_multiply_are_refused():
    with pytest.raises(ValueError, match="no linear layer of a block has sides that are multiples of 16"):
        multiply_in_float8(OneLayer(24, 16), CPU, emulated=True)


def test_without_torchao_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ImportError, match=r"multiply_in_float8: torchao is not installed; pip install \"grr-coca\[q"):
        multiply_in_float8(grr_coca_tiny(), CPU, emulated=True)


@pytest.mark.gpu
def test_a_gpu_multiplies_as_emulated():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with float8")
    device = torch.device("cuda")
    gradients = []
    for emulated in (False, True):
        torch.manual_seed(0)
        model = OneLayer(64, 32)
        multiply_in_float8(model, device, emulated=emulated)
        layer = model.to(device).block.feed_forward
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        gradients.append([y, x.grad, layer.weight.grad])
    for found, expected in zip(*gradients, strict=True):
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
