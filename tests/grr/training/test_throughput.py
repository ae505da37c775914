"""Throughput covers the steps since the last call, without the seconds of validations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.data import Batch
from grr.training import throughput
from grr.training.throughput import Throughput

SECONDS = st.floats(0.01, 100)
STEP = st.tuples(st.just("step"), SECONDS, SECONDS, st.lists(st.integers(0, 3), min_size=1, max_size=3))
PAUSE = st.tuples(st.just("validation"), SECONDS)
EVENTS = st.lists(st.one_of(STEP, PAUSE, st.tuples(st.just("metrics"))), max_size=20)


class Clock:
    """Returns the time that the test has set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def batch(replaced: int) -> Batch:
    return Batch(torch.empty(0), *[torch.empty(0, dtype=torch.long)] * 5, num_labels=0, names=[], replaced=replaced)


@given(events=EVENTS, batch_size=st.integers(1, 999))
def test_metrics_cover_the_steps_since_the_last_call_and_leave_out_validations(events, batch_size):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "monotonic", clock)
        meter, taken = Throughput(batch_size), []  # steps since the last call of metrics
        for kind, *values in events:
            if kind == "step":
                wait, compute, replaced = values
                with meter.waiting():
                    clock.now += wait
                clock.now += compute
                meter.step([batch(n) for n in replaced])
                taken.append((wait, compute, sum(replaced)))
            elif kind == "validation":
                with meter.paused():
                    clock.now += values[0]
            elif taken:
                waits, computes, replaced = zip(*taken, strict=True)
                assert meter.metrics() == {
                    "samples_per_second": pytest.approx(len(taken) * batch_size / (sum(waits) + sum(computes))),
                    "data_wait": pytest.approx(sum(waits) / len(taken)),
                    "replaced": sum(replaced),
                }
                taken = []
