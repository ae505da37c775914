"""EMA and WiSE-FT, of plain and sharded models."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from grr.models.builders import grr_coca_tiny
from grr.models.coca import CoCa
from grr.parallel.shard import shard_over
from grr.training.ema import EMA, weights_of, wise_ft


@pytest.fixture(params=["plain", "sharded"])
def model(request, tmp_path) -> Iterator[CoCa]:
    """A model, plain or sharded by a process group of this one process."""
    torch.manual_seed(0)
    coca = grr_coca_tiny()
    if request.param == "plain":
        yield coca
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    shard_over(coca, init_device_mesh("cpu", (1,)))
    yield coca
    del coca
    dist.destroy_process_group()


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(whole(a[name]), whole(b[name])) for name in a)


def disturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            local = p.to_local() if isinstance(p, DTensor) else p
            local.add_(torch.randn(local.shape, generator=generator))


def answer(model: nn.Module) -> Tensor:
    """What the model computes, by a forward pass without a backward pass."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.tensor([[510, 5, 6, 1, 511, 0]] * 2)
    with torch.no_grad():
        return model(images, ids).logits


@given(decay=st.floats(0.01, 0.999), values=st.lists(st.floats(-100, 100), min_size=1, max_size=12))
def test_the_mean_weighs_each_step_by_the_formula(decay, values):
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(values[0])
    ema = EMA(model, decay=decay)
    for value in values[1:]:
        model.weight.data.fill_(value)
        ema.update()
    n = len(values) - 1
    expected = decay**n * values[0] + sum((1 - decay) * decay ** (n - i) * values[i] for i in range(1, n + 1))
    assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_mean_equals_torchs_averaged_model():
    model = grr_coca_tiny()
    ema, torchs = EMA(model, decay=0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    torchs.update_parameters(model)  # its first call copies
    for seed in range(3):
        disturb(model, seed)
        ema.update()
        torchs.update_parameters(model)
    for name, p in torchs.module.named_parameters():
        torch.testing.assert_close(ema.weights[name], p.detach())


def test_applied_swaps_the_mean_in_and_the_trained_weights_back(model):
    started, sharded = snapshot(model), dist.is_initialized()
    before = answer(model)  # after it, FSDP2 keeps the unsharded parameters
    ema = EMA(model, decay=0.5)
    assert all(isinstance(x, DTensor) == sharded for x in ema.weights.values())
    disturb(model, 0)
    ema.update()
    trained, after = snapshot(model), answer(model)
    mean = {name: whole(x) for name, x in ema.weights.items()}
    torch.testing.assert_close(mean, {name: (started[name] + trained[name]) / 2 for name in started})

    with ema.applied():
        assert same(snapshot(model), mean)
        assert same(ema.weights, trained)
        between = answer(model)
    assert same(snapshot(model), trained)
    assert same(ema.weights, mean)
    assert torch.equal(answer(model), after)

    wise_ft(model, ema.weights, alpha=1.0)
    assert torch.equal(answer(model), between)
    assert not torch.equal(between, before)
    assert not torch.equal(between, after)


def test_an_error_inside_applied_restores_the_trained_weights(model):
    ema = EMA(model, decay=0.5)
    disturb(model, 0)
    trained = snapshot(model)
    with pytest.raises(KeyboardInterrupt), ema.applied():
        raise KeyboardInterrupt
    assert same(snapshot(model), trained)


def test_decay_0_holds_no_mean(model):
    ema = EMA(model, decay=0.0)
    before = snapshot(model)
    ema.update()
    with ema.applied():
        assert same(snapshot(model), before)
    assert ema.weights == {}


def test_tied_weights_have_one_mean():
    model = grr_coca_tiny(tied_embeddings=True)
    ema = EMA(model, decay=0.5)
    disturb(model, 0)
    ema.update()
    with ema.applied():
        assert torch.equal(model.multimodal_decoder.head.weight, model.text_decoder.embedding.weight)


@given(alpha=st.floats(0, 1))
def test_wise_ft_is_the_line_between_two_models(alpha):
    torch.manual_seed(0)
    start, other = grr_coca_tiny(), grr_coca_tiny()
    a, b = snapshot(start), snapshot(other)
    wise_ft(start, weights_of(other), alpha=alpha)
    for name, x in snapshot(start).items():
        expected = (1 - alpha) * a[name].double() + alpha * b[name].double()
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)


def test_alpha_0_and_1_are_exactly_the_two_models(model):
    start = snapshot(model)
    mine = weights_of(model)
    disturb(model, 0)
    other, theirs = snapshot(model), weights_of(model)
    wise_ft(model, mine, alpha=1.0)
    assert same(snapshot(model), start)
    wise_ft(model, theirs, alpha=0.0)
    assert same(snapshot(model), start)
    wise_ft(model, theirs, alpha=1.0)
    assert same(snapshot(model), other)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"EMA: decay must be at least 0 and below 1, got {decay=}"):
        EMA(nn.Linear(1, 1), decay=decay)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=f"wise_ft: alpha must be from 0 to 1, got {alpha=}"):
        wise_ft(nn.Linear(1, 1), {}, alpha=alpha)
