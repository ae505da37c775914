"""A line of the log counts the steps since the line before, and no second in which none was taken."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.data import Batch
from grr.training import throughput as pace
from grr.training.throughput import Pace

SECONDS = st.floats(0.01, 100)
STEP = st.tuples(st.just("step"), SECONDS, SECONDS, st.lists(st.integers(0, 3), min_size=1, max_size=3))
EVENTS = st.lists(st.one_of(STEP, st.tuples(st.just("validation"), SECONDS), st.tuples(st.just("line"))), max_size=20)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def batch(replaced: int) -> Batch:
    return Batch(torch.empty(0), *[torch.empty(0, dtype=torch.long)] * 3, names=[], replaced=replaced)


@given(events=EVENTS, batch_size=st.integers(1, 999))
def test_every_line_tells_the_steps_since_the_last_and_leaves_out_validations_wherever_they_stood(events, batch_size):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "monotonic", clock)
        counted, taken = Pace(batch_size), []  # steps since the last line
        for kind, *values in events:
            if kind == "step":
                wait, compute, replaced = values
                with counted.waiting():
                    clock.now += wait
                clock.now += compute
                counted.step([batch(n) for n in replaced])
                taken.append((wait, compute, sum(replaced)))
            elif kind == "validation":
                with counted.paused():
                    clock.now += values[0]
            elif taken:
                waits, computes, replaced = zip(*taken, strict=True)
                assert counted.line() == {
                    "samples_per_second": pytest.approx(len(taken) * batch_size / (sum(waits) + sum(computes))),
                    "data_wait": pytest.approx(sum(waits) / len(taken)),
                    "replaced": sum(replaced),
                }
                taken = []
