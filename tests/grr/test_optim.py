"""The optimizer's groups and the learning rate's curve."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.builders import grr_coca_tiny
from grr.optim import adamw, set_lr, warmup_cosine


@given(warmup=st.integers(0, 30), cycle=st.integers(1, 40), step=st.integers(0, 200))
def test_after_warm_up_it_is_torchs_cosine_with_warm_restarts(warmup, cycle, step):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-4)
    torchs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=cycle, eta_min=1e-6)
    for _ in range(step):
        optimizer.step()
        torchs.step()
    ours = warmup_cosine(warmup + step, cycle, 1e-4, min_lr=1e-6, warmup_steps=warmup)
    assert ours == pytest.approx(torchs.get_last_lr()[0], rel=1e-9)


@given(warmup=st.integers(1, 100))
def test_warm_up_is_linear_and_ends_at_the_peak(warmup):
    rates = [warmup_cosine(i, 10, 1.0, min_lr=0.0, warmup_steps=warmup) for i in range(warmup)]
    assert rates == pytest.approx([(i + 1) / warmup for i in range(warmup)])


def test_one_cycle_can_span_many_epochs():
    rates = [warmup_cosine(i, 10, 1.0, min_lr=0.0, cycle_epochs=3) for i in range(31)]
    assert rates[:30] == sorted(rates[:30], reverse=True)
    assert rates[30] == 1.0


def test_the_paper_decays_everything_and_the_option_only_matrices():
    model = grr_coca_tiny()
    (everything,) = adamw(model).param_groups
    assert len(everything["params"]) == len(list(model.parameters()))
    assert everything["weight_decay"] == 1e-3
    assert everything["betas"] == (0.9, 0.999)
    matrices, rest = adamw(model, decay_all=False).param_groups
    assert all(p.dim() > 1 for p in matrices["params"])
    assert rest["weight_decay"] == 0.0
    assert len(matrices["params"]) + len(rest["params"]) == len(everything["params"])


def test_set_lr_reaches_every_group():
    optimizer = adamw(grr_coca_tiny(), decay_all=False)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"min_lr": 2.0}, "min_lr must not be above the optimizer's lr, got min_lr=2.0, lr=1.0"),
    ({"min_lr": 0.0, "cycle_epochs": 0}, "cycle_epochs above 0, got warmup_steps=0, cycle_epochs=0"),
])  # fmt: skip
def test_a_wrong_schedule_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(0, 10, 1.0, **arguments)
