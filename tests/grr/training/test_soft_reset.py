"""Fine-tuning has three learning-rate regimes, each ended by three validations without improvement."""

import itertools
import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grr.training.schedule import warmup_cosine
from grr.training.soft_reset import SoftReset, describe_decision, soft_reset

LOSSES = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, math.nan, math.inf]), max_size=40)
CONTROL = st.fixed_dictionaries(
    {"patience": st.integers(1, 4), "regimes": st.integers(1, 4), "factor": st.sampled_from([1.0, 10.0, 100.0])}
)


def judged(losses: Sequence[float], **control: float) -> list[SoftReset]:
    """The states after each validation, one every ten steps, up to the stop."""
    states, state = [], SoftReset()
    for i, loss in enumerate(losses):
        state = soft_reset(state, 10 * i, loss, **control)  # type: ignore[arg-type]
        states.append(state)
        if state.decision == "stop":
            break
    return states


@given(losses=LOSSES, control=CONTROL)
def test_the_best_loss_is_the_first_lowest_one(losses, control):
    states = judged([7.0, *losses], **control)
    for n, state in enumerate(states, 1):
        finite = [loss if math.isfinite(loss) else math.inf for loss in [7.0, *losses][:n]]
        assert state.best_loss == min(finite)
        assert state.best_step == 10 * finite.index(min(finite))
        assert (state.decision == "improved") == (state.best_step == state.step)


@example(losses=[math.inf] * 9, control={"patience": 3, "regimes": 3, "factor": 100.0})  # chance seldom gets there
@given(losses=LOSSES, control=CONTROL)
def test_regimes_end_with_each_full_patience_of_a_streak(losses, control):
    """Of a streak of validations without improvement each whole `patience` ends a regime; the last end is the stop."""
    states = judged([7.0, *losses], **control)
    for n, state in enumerate(states, 1):
        improved = [s.decision == "improved" for s in states[:n]]
        streaks = [len(list(streak)) for better, streak in itertools.groupby(improved) if not better]
        ended = sum(length // control["patience"] for length in streaks)
        stopped = state.decision == "stop"
        assert state.regime == 1 + ended - stopped <= control["regimes"]
        assert stopped == (ended == control["regimes"])
        assert state.divisor == control["factor"] ** (state.regime - 1)
    assert len(states) == 1 + len(losses) or states[-1].decision == "stop"


@given(falls=st.integers(1, 20))
def test_nine_validations_after_the_last_improvement_it_stops(falls):
    decisions = [s.decision for s in judged([1 / (n + 1) for n in range(falls)] + [2.0] * 20)]
    assert decisions == ["improved"] * falls + ["continue", "continue", "reset"] * 2 + ["continue", "continue", "stop"]


def test_an_improvement_restarts_the_patience_and_keeps_the_learning_rate():
    states = judged([9, 9, 9, 8, 8, 8, 8, 7, 7, 7, 7, 7, 6, 6, 6, 6, 5])
    assert "".join(s.decision[0] for s in states) == "iccicc" + "ricc" + "rcicc" + "s"
    assert [s.regime for s in states] == [1] * 6 + [2] * 4 + [3] * 6


@given(losses=LOSSES, control=CONTROL)
def test_a_state_survives_json(losses, control):
    for state in judged([7.0, *losses], **control):
        assert SoftReset(**json.loads(json.dumps(state._asdict(), allow_nan=False))) == state


@given(step=st.integers(0, 60), regime=st.integers(0, 3))
def test_a_divided_cosine_is_the_cosine_between_divided_ends(step, regime):
    divisor = 100.0**regime
    divided = warmup_cosine(step, 20, 1e-5, min_lr=1e-7) / divisor
    assert divided == pytest.approx(warmup_cosine(step, 20, 1e-5 / divisor, min_lr=1e-7 / divisor), rel=1e-12)


def test_each_decision_has_a_description():
    states = judged([3.0] + [4.0] * 20, patience=2, regimes=2)
    assert list(map(describe_decision, states)) == [
        "the best so far",
        "the best, 3.0000, was after step 0; validations without improvement: 1",
        "the best, 3.0000, was after step 0: reset to it, with the learning rate divided by 100",
        "the best, 3.0000, was after step 0; validations without improvement: 1",
        "the best, 3.0000, was after step 0: stop after the last learning-rate regime",
    ]


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"patience": 0}, "got patience=0, regimes=3, factor=100.0"),
        ({"regimes": 0}, "got patience=3, regimes=0, factor=100.0"),
        ({"factor": 0.5}, "got patience=3, regimes=3, factor=0.5"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, got):
    with pytest.raises(ValueError, match=f"soft_reset: patience, regimes and factor must be at least 1, {got}"):
        soft_reset(SoftReset(), 0, 1.0, **arguments)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_first_loss_that_is_not_finite_is_refused(loss):
    with pytest.raises(ValueError, match=f"soft_reset: the loss must be finite .*got {loss}; check the weights"):
        soft_reset(SoftReset(), 0, loss)
