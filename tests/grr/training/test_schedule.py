"""The learning rate as a function of the step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.models.builders import grr_coca_tiny
from grr.training.optim import adamw
from grr.training.schedule import describe_end, set_lr, warmup_cosine


def torchs_rates(cycle: int, steps: int) -> list[float]:
    """The rate of each step by torch's cosine annealing with warm restarts, from 1e-4 to 1e-6."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=cycle, eta_min=1e-6)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@given(warmup=st.integers(0, 60), cycle=st.integers(1, 40))
def test_after_warm_up_the_rate_is_torchs_cosine_and_a_cycle_ends_with_its_epoch(warmup, cycle):
    ours = [warmup_cosine(i, cycle, 1e-4, min_lr=1e-6, warmup_steps=warmup) for i in range(5 * cycle + warmup)]
    first = (warmup // cycle + 1) * cycle  # the end of the cycle in which the warm-up ends
    assert ours[warmup:first] == pytest.approx(torchs_rates(first - warmup, first - warmup), rel=1e-9)
    assert ours[first:] == pytest.approx(torchs_rates(cycle, len(ours) - first), rel=1e-9)


def test_the_papers_schedule_ends_every_epoch_at_the_minimum_rate():
    per_epoch = 10_445_110 // 768
    schedule = {"min_lr": 1e-6, "warmup_steps": 2000}
    for epoch in range(1, 22):
        assert warmup_cosine(epoch * per_epoch - 1, per_epoch, 1e-4, **schedule) == pytest.approx(1e-6, rel=1e-4)
    full = describe_end(21 * per_epoch, per_epoch, 1e-4, **schedule)
    assert full == (
        f"the last step is {21 * per_epoch:,}, after 21 epochs of 13,600 steps; the learning rate has then fallen to "
        "1.0e-06, the end of its cosine"
    )
    cut = describe_end(300_000, per_epoch, 1e-4, **schedule)
    assert cut == (
        "the last step is 300,000, after 22.06 epochs of 13,600 steps; the learning rate is then 9.9e-05, and its "
        f"cosine would end at step {23 * per_epoch:,}"
    )


@given(warmup=st.integers(1, 100))
def test_warm_up_is_linear_and_ends_at_the_peak(warmup):
    rates = [warmup_cosine(i, 10, 1.0, min_lr=0.0, warmup_steps=warmup) for i in range(warmup)]
    assert rates == pytest.approx([(i + 1) / warmup for i in range(warmup)])


def test_one_cycle_can_span_many_epochs():
    rates = [warmup_cosine(i, 10, 1.0, min_lr=0.0, cycle_epochs=3) for i in range(31)]
    assert rates[:30] == sorted(rates[:30], reverse=True)
    assert rates[30] == 1.0


def test_set_lr_reaches_every_group():
    optimizer = adamw(grr_coca_tiny(), decay_all=False)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_group_without_a_scale_has_the_full_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_lr": 2.0}, "min_lr must not be above the optimizer's lr, got min_lr=2.0, lr=1.0"),
        ({"min_lr": 0.0, "cycle_epochs": 0}, "cycle_epochs above 0, got warmup_steps=0, cycle_epochs=0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(0, 10, 1.0, **arguments)
