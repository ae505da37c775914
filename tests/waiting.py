"""Processes and conditions that tests wait for, always with a deadline."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 120.0


@contextlib.contextmanager
def started(words: list[str], *, seconds: float = SECONDS, **options: Any) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, whose whole group is killed after `seconds` and at the end of the block.

    So no read from it waits for longer: a pipe of a killed group is at its end.
    """
    process = subprocess.Popen(words, start_new_session=True, **options)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        kill()
        process.wait(timeout=SECONDS)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen | None = None, *, seconds: float = SECONDS
) -> None:
    """Return as soon as the condition holds; fail if it does not within `seconds`, or the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds:g} s"
        time.sleep(0.01)
