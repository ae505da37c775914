"""Throughput covers the steps since the last call, without the seconds of validations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.data import Batch
from grr.training import throughput
from grr.training.throughput import Throughput, duration

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


def test_the_time_left_is_that_of_the_steps_between_the_first_and_the_second_line_and_is_returned_once(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "monotonic", clock)
    meter, lines = Throughput(32), []
    for step in range(1, 41):
        clock.now += 60.0 if step == 1 else 0.5  # the first step compiles
        meter.step([batch(0)])
        if step == 15:
            with meter.paused():
                clock.now += 100.0
        if step % 10 == 0:
            meter.metrics()
            lines.append(meter.time_left(500 - step))
    sentence = "the remaining 480 steps take about 4 minutes on this machine, without validations"
    assert lines == [None, sentence, None, None]
    assert Throughput(32).time_left(5) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "about 0 seconds"), (89, "about 89 seconds"), (239, "about 4 minutes"), (9000, "about 2.5 hours")],
)
def test_a_duration_has_the_unit_that_suits_it(seconds, words):
    assert duration(seconds) == words
