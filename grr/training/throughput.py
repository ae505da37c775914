"""Throughput meter: samples per second and seconds spent waiting for data, between two lines of the log; time left."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from grr.data import Batch


class Throughput:
    """Throughput meter: count optimizer steps, and the seconds that they take, since the last call of `metrics`."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size  # samples in a step, over all processes
        self._calls, self._steps_timed, self._seconds = 0, 0, 0.0  # calls of metrics; since the last estimate
        self._reset()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the seconds of the block as waiting for data."""
        start = monotonic()
        yield
        self._waited += monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the seconds of the block out, for example those of a validation."""
        start = monotonic()
        yield
        self._since += monotonic() - start

    def step(self, micro_batches: Sequence[Batch]) -> None:
        """Count one optimizer step, and its samples that replaced unreadable ones in this process."""
        self._steps += 1
        self._replaced += sum(batch.replaced for batch in micro_batches)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the steps since the last call, of which there must be at least one, and resets.

        samples_per_second: over all processes; data_wait: seconds per step; replaced: samples of this process.
        """
        seconds = monotonic() - self._since
        if self._calls:  # the first steps allocate memory, fill queues or compile
            self._steps_timed, self._seconds = self._steps_timed + self._steps, self._seconds + seconds
        self._calls += 1
        metrics = {
            "samples_per_second": self._batch_size * self._steps / seconds,
            "data_wait": self._waited / self._steps,
            "replaced": self._replaced,
        }
        self._reset()
        return metrics

    def time_left(self, steps: int) -> str | None:
        """Returns the time of the remaining steps in words after call 2, 4, 8, ... of `metrics`, None at other times.

        It is that of the steps since the last estimate, the second half of all, because a first epoch that draws or
        decodes what later ones find in memory is slower than the rest. The steps before the first call do not count.
        """
        if self._calls < 2 or self._calls & (self._calls - 1) or steps < 1:
            return None
        time = duration(steps * self._seconds / self._steps_timed)
        self._steps_timed, self._seconds = 0, 0.0
        return f"the remaining {steps:,} steps take {time} on this machine, without validations"

    def _reset(self) -> None:
        self._since = monotonic()
        self._waited, self._steps, self._replaced = 0.0, 0, 0


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it: about 40 seconds, about 4 minutes, about 2.5 hours."""
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} hours"
