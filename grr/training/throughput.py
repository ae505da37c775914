"""Throughput meter: samples per second and seconds spent waiting for data, between two lines of the log."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from grr.data import Batch


class Throughput:
    """Throughput meter: count optimizer steps, and the seconds that they take, since the last call of `metrics`."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size  # samples in a step, over all processes
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
        metrics = {
            "samples_per_second": self._steps * self._batch_size / (monotonic() - self._since),
            "data_wait": self._waited / self._steps,
            "replaced": self._replaced,
        }
        self._reset()
        return metrics

    def _reset(self) -> None:
        self._since = monotonic()
        self._waited, self._steps, self._replaced = 0.0, 0, 0
