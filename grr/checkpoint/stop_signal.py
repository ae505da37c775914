"""Requests to stop a run."""

import os
import signal
from types import FrameType

from grr.parallel.process_group import all_max


class StopSignal:
    """Record a request to stop, so that a loop can save and return: SIGTERM, the first SIGINT, or the end of torchrun.

    A second SIGINT raises KeyboardInterrupt. To be made in the main thread of every rank.
    """

    def __init__(self) -> None:
        self._status = 0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    @property
    def status(self) -> int:
        """The exit status that was requested of this process: 0, 130 after SIGINT, 143 after SIGTERM.

        It is 143 for a worker whose torchrun has ended, too, because nothing else would stop the worker.
        """
        if not self._status and self._launcher is not None and os.getppid() != self._launcher:
            self._status = 128 + signal.SIGTERM
        return self._status

    def requested(self) -> bool:
        """Returns whether any rank was asked to stop. Called by all ranks together; all get the same answer."""
        self._status = all_max(self.status)
        return self._status > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._status = 128 + number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
