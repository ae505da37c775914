"""Throughput covers the steps since the last call, without the seconds of validations."""

import pytest
import torch
from hypothesis import given, settings
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


def estimates(monkeypatch, seconds, *, steps: int, log_every: int = 10) -> dict[int, str]:
    """Returns the estimates of a run whose step k, counted from 0, takes seconds(k), by the step they are made at."""
    clock = Clock()
    monkeypatch.setattr(throughput, "monotonic", clock)
    meter, lines, read = Throughput(32), {}, [batch(0)]
    for step in range(1, steps + 1):
        clock.now += seconds(step - 1)
        meter.step(read)
        if step % log_every == 0:
            meter.metrics()
            if line := meter.time_left(steps - step):
                lines[step] = line
        if step == log_every + 5:
            with meter.paused():  # a validation, or the first report
                clock.now += 1000.0
    return lines


def test_the_time_left_is_that_of_the_steps_after_the_first_line_without_validations(monkeypatch):
    lines = estimates(monkeypatch, lambda k: 60.0 if k == 0 else 0.5, steps=500)  # the first step compiles
    sentence = "the remaining 480 steps take about 4 minutes on this machine, without validations"
    assert lines[20] == sentence
    assert list(lines) == [20, 40, 80, 160, 320]
    assert Throughput(32).time_left(5) is None


@settings(max_examples=20)
@given(first=st.integers(1, 300), slow=st.floats(1.1, 5), fast=st.floats(0.2, 1))
def test_the_time_left_converges_on_the_true_time_after_a_slow_first_epoch(first, slow, fast):
    steps = 3000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "duration", lambda seconds: f"<{seconds!r}>")
        lines = estimates(patch, lambda k: slow if k < first else fast, steps=steps)
    errors = {}
    for step, line in lines.items():
        true = slow * max(0, first - step) + fast * (steps - max(step, first))
        errors[step] = abs(float(line.partition("<")[2].partition(">")[0]) / true - 1)
    for step, error in errors.items():
        if step >= 2 * first + 20:  # the second half of the steps so far lies behind the first epoch
            assert error < 1e-9
    assert errors[max(errors)] < 1e-9


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "about 0 seconds"), (89, "about 89 seconds"), (239, "about 4 minutes"), (9000, "about 2.5 hours")],
)
def test_a_duration_has_the_unit_that_suits_it(seconds, words):
    assert duration(seconds) == words
