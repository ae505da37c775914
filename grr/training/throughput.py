"""How fast a training loop is: what stands in a line of its log about the steps since the line before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from grr.data import Batch


class Pace:
    """Count optimizer steps and the seconds they take, from one line of the log to the next; pauses do not count."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size  # samples in a step, over all processes
        self._begin()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which the step waits for its data."""
        before = monotonic()
        yield
        self._waited += monotonic() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that belongs to no step: a validation."""
        before = monotonic()
        yield
        self._since += monotonic() - before

    def step(self, micro_batches: Sequence[Batch]) -> None:
        """Count a step that was taken, and the samples of this process that stood in for ones that cannot be read."""
        self._steps += 1
        self._replaced += sum(batch.replaced for batch in micro_batches)

    def line(self) -> dict[str, float]:
        """What a line of the log says of the steps since the last one, one at least; then count anew.

        samples_per_second over all processes, data_wait in seconds a step, replaced samples of this process.
        """
        numbers = {
            "samples_per_second": self._steps * self._batch_size / (monotonic() - self._since),
            "data_wait": self._waited / self._steps,
            "replaced": self._replaced,
        }
        self._begin()
        return numbers

    def _begin(self) -> None:
        self._since = monotonic()
        self._waited, self._steps, self._replaced = 0.0, 0, 0
