"""Sends the lines of a run's log to one logger, whose faults do not reach the run."""

import atexit
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from grr.training.loggers.logger import Line, Logger

RETRY_SECONDS = 300.0

logger = logging.getLogger(__name__)


class Sender:
    """Send lines to a logger in their order, without those that it has; never raise.

    open: returns the logger; called at the first line, or again after it has failed. lines: the log so far. After a
    fault, which is warned of once, lines wait in memory, and the next line RETRY_SECONDS later is preceded by them. The
    line "final" is sent also where the logger has one: its model may be another.
    """

    def __init__(self, name: str, open: Callable[[], Logger], lines: Iterable[Line] = ()) -> None:
        self._name, self._open = name, open
        self._logger: Logger | None = None
        self._waiting = deque(lines)
        self._retry_at, self._warned = 0.0, False
        atexit.register(self._stop)
        self._deliver()

    def send(self, line: Line) -> None:
        """Send a line after those that wait, or let it wait as well."""
        self._waiting.append(line)
        if time.monotonic() >= self._retry_at:
            self._deliver()

    def close(self, *, finished: bool) -> None:
        """Send what waits and end the run in the logger."""
        atexit.unregister(self._stop)
        self._deliver()
        try:
            if self._logger is not None:
                self._logger.close(finished=finished)
        except Exception as error:
            self._warn(error)
        self._logger, self._retry_at = None, float("inf")

    def _stop(self) -> None:
        self.close(finished=False)

    def _deliver(self) -> None:
        try:
            if self._logger is None:
                self._logger = self._open()
            while self._waiting:
                line = self._waiting[0]
                if line.split == "final" or line.step > self._logger.held.get(line.split, -1):
                    self._logger.write(line)
                self._waiting.popleft()
        except Exception as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: a logger must not end a run, and this one fails (%s: %s); the run goes on, metrics.jsonl has its "
                "numbers, and %s gets what it lacks when it works again, or when the run is resumed",
                self._name,
                type(error).__name__,
                " ".join(str(error).split()),
                self._name,
            )
