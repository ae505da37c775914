"""Errors of functions that run in readers' threads."""

import threading
from collections.abc import Callable
from typing import TypeVar

X = TypeVar("X")
Y = TypeVar("Y")


def in_thread(read: Callable[[X], Y]) -> Callable[[X], Y]:
    """Returns `read` with SystemExit and other errors that are not an Exception replaced by RuntimeError.

    Such an error ends only its thread: the main thread would wait for the result forever, or exit with the status of
    SystemExit(0) as if the run had finished. StopIteration is replaced too, because it would end the loop that reads.
    In the main thread, SystemExit and KeyboardInterrupt pass, because they come from the user.
    """

    def reading(item: X) -> Y:
        try:
            return read(item)
        except BaseException as error:
            in_main = threading.current_thread() is threading.main_thread()
            passed = (Exception, SystemExit, KeyboardInterrupt) if in_main else Exception
            if isinstance(error, passed) and not isinstance(error, StopIteration):
                raise
            raise RuntimeError(f"a thread that reads data must not raise {error!r}; the run ends") from error

    return reading
