"""Measurements: which calls count, in which order acts are called, and what is said of memory and the machine."""

import time

import pytest
import torch

from grr.evaluation.timing import describe_machine, is_out_of_memory, measure, processor, time_in_turns

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that an act moves by clock[0] += seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_median_is_that_of_the_calls_after_the_warm_up(clock):
    durations = iter([100.0, 50.0, 3.0, 1.0, 2.0, 9.0, 4.0])

    def act() -> None:
        clock[0] += next(durations)

    measured = measure(act, CPU, warmup=2, iterations=5)
    assert (measured.seconds, measured.warmup_seconds) == (3.0, 150.0)
    assert next(durations, None) is None


def test_acts_take_turns_and_each_has_its_own_times(clock):
    calls = []

    def act(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    taken = time_in_turns([lambda: act("a", 1.0), lambda: act("b", 2.0)], CPU, rounds=3)
    assert calls == ["a", "b"] * 3
    assert taken == [[1.0] * 3, [2.0] * 3]


def test_the_peak_holds_what_a_call_allocated():
    size = 2**27

    def peak(count: int) -> int | None:
        return measure(lambda: torch.ones(count, dtype=torch.uint8).sum(), CPU, warmup=0, iterations=1).peak_bytes

    small, large = peak(1), peak(size)
    if small is None or large is None:
        pytest.skip("the system does not report peak memory")
    assert large - small > size / 2


def test_a_failed_allocation_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_the_processor_is_named_with_its_instructions():
    machine = describe_machine(CPU)
    assert processor(machine) == f"{machine['cpu']} ({torch.backends.cpu.get_cpu_capability()})"
    assert processor({**machine, "device": "NVIDIA H200"}).startswith("NVIDIA H200, ")
    assert machine["threads"] == torch.get_num_threads()
