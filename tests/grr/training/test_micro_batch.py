"""The size of a micro-batch that is left to the memory: the largest that fits, measured, and the same when resumed."""

import logging
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.components import recompute
from grr.data.order import largest_divisor
from grr.models.builders import grr_coca_tiny
from grr.parallel.parallelize import parallelize
from grr.training import micro_batch
from grr.training.micro_batch import USABLE, choose_micro_batch_size, count_kept_bytes
from grr.training.optim import adamw
from grr.training.random_batches import NumberTokenizer, random_batches
from grr.training.step import global_batch_step

pytestmark = pytest.mark.usefixtures("process_group")
TOKENS = NumberTokenizer(512, 16)
SIZES = {"vocab_size": 512, "context_length": 16, "image_size": 32}


@pytest.fixture
def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = grr_coca_tiny()
    return model, adamw(model, lr=1e-3)


def choose(parts, batch_size: int, wanted: int | None = None, **options) -> int:
    run = {"micro_batch_size": wanted, "batch_size": batch_size}
    return choose_micro_batch_size(run, partial(global_batch_step, parts[0], seed=0), *parts, TOKENS, 32, **options)


def kept(model: torch.nn.Module, n: int) -> int:
    """Returns the bytes that a step of n pairs keeps for its backward pass."""
    with count_kept_bytes(model) as found:
        global_batch_step(model, random_batches(1, batch_size=n, **SIZES), 0)
    model.zero_grad(set_to_none=True)
    return found.most


@given(number=st.integers(1, 2000), most=st.integers(-5, 3000))
def test_the_largest_divisor_is_found(number, most):
    size = largest_divisor(number, most)
    assert number % size == 0
    assert size <= max(1, most)
    assert not [d for d in range(size + 1, min(number, most) + 1) if number % d == 0]


@pytest.mark.parametrize("fitting", [3.5, 5.5, 12.5, 40])
def test_the_size_is_the_largest_whose_activations_fit_beside_gradients_and_optimizer_state(
    parts, monkeypatch, fitting
):
    """Memory for so many pairs; a step of the chosen size is run and counted, and one of the next larger divisor."""
    weights = sum(p.nbytes for p in parts[0].parameters())
    a_pair = kept(parts[0], 16) / 16
    room = fitting * a_pair
    monkeypatch.setattr(micro_batch, "free_memory_of_process", lambda device: (room + 3 * weights) / USABLE["cpu"])
    size = choose(parts, 24)
    assert 24 % size == 0
    assert kept(parts[0], size) <= 1.1 * room  # labels are padded to a multiple of 64, so bytes are not quite linear
    larger = [d for d in range(size + 1, 25) if 24 % d == 0]
    assert not larger or kept(parts[0], larger[0]) > 0.9 * room


@pytest.mark.parametrize(("fitting", "size"), [(12.5, 12), (25, 24), (40, 24)])
def test_pairs_of_a_larger_micro_batch_take_less_and_the_size_is_that_which_fits_them(
    parts, monkeypatch, fitting, size
):
    """From 8 pairs on, the outputs of feed-forward networks are computed again in the backward pass."""
    model, _ = parts
    monkeypatch.setattr(recompute, "LARGE", 40_000)
    a_pair, a_small_pair = kept(model, 24) / 24, (kept(model, 4) - kept(model, 2)) / 2
    assert a_small_pair > 1.3 * a_pair
    weights = sum(p.nbytes for p in model.parameters())
    room = fitting * a_pair
    monkeypatch.setattr(micro_batch, "free_memory_of_process", lambda device: (room + 3 * weights) / USABLE["cpu"])
    measured = []

    def step(batches):
        measured.append(len(batches[0].images))
        global_batch_step(model, batches, seed=0)

    run = {"micro_batch_size": None, "batch_size": 24}
    assert choose_micro_batch_size(run, step, *parts, TOKENS, 32) == size
    assert all(kept(model, n) <= room for n in (size, *measured))  # no step needs more memory than there is


def test_the_bytes_of_a_step_are_those_that_graphs_keep_at_one_time():
    """Two layers one after the other keep no more than one; storages that are kept twice count once."""
    layer, x = torch.nn.Linear(16, 16), torch.randn(8, 16)
    with count_kept_bytes(layer) as found:
        for _ in range(2):
            layer(x).sum().backward()
        assert (found.now, found.most) == (0, x.nbytes)
        (layer(x) + layer(x[:4]).sum()).sum()
        both = layer(x).exp() + layer(x.view(8, 16))  # x twice, and the result of exp
        assert (found.now, found.most) == (2 * x.nbytes, 2 * x.nbytes)
        del both
    assert found.now == 0


def test_bfloat16_copies_of_the_weights_are_not_counted(process_group):
    """What is kept grows with the pairs; what any number of them keeps is less than half of the copies."""
    model = grr_coca_tiny()
    parallelize(model, torch.device("cpu"), bf16=True, compile=False)
    first = kept(model, 16)  # makes the copies
    assert kept(model, 16) == first
    copies = sum(2 * p.numel() for p in model.parameters())
    assert 0 <= 2 * first - kept(model, 32) < copies / 2


def test_measuring_leaves_no_gradients_no_state_and_no_other_weights(parts):
    model, optimizer = parts
    before = {name: p.clone() for name, p in model.named_parameters()}
    choose(parts, 8)
    assert not optimizer.state
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])
    assert model.training


def test_a_size_that_is_given_is_taken_and_nothing_is_measured(parts, monkeypatch):
    monkeypatch.setattr(micro_batch, "free_memory_of_process", lambda device: 0)
    assert choose(parts, 24, wanted=12) == 12


def test_memory_for_less_than_a_pair_leaves_micro_batches_of_one(parts, monkeypatch):
    monkeypatch.setattr(micro_batch, "free_memory_of_process", lambda device: 0)
    assert choose(parts, 24) == 1


@pytest.mark.parametrize(
    ("recorded", "batch_size", "again"),
    [("run: {micro_batch_size: 3}", 24, True), ("run: {micro_batch_size: 5}", 24, False), ("run: {}", 24, False)],
)
def test_a_resumed_run_uses_the_size_of_its_steps_before_if_it_still_divides(
    parts, tmp_path, caplog, recorded, batch_size, again
):
    (tmp_path / "config.yaml").write_text(recorded)
    with caplog.at_level(logging.INFO, logger="grr"):
        size = choose(parts, batch_size, resumed=tmp_path)
    assert size == (3 if again else 24)
    assert ("micro-batches have 3 pairs, as in the steps before" in caplog.text) == again
    assert ("micro-batches have 24 of the 24 pairs" in caplog.text) != again
