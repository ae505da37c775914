"""Functions that run in threads of readers."""

import threading
from collections.abc import Callable
from typing import TypeVar

X = TypeVar("X")
Y = TypeVar("Y")


def in_thread(read: Callable[[X], Y]) -> Callable[[X], Y]:
    """Returns `read`, which raises RuntimeError in place of SystemExit and of whatever else is not an Exception.

    Such an error ends its thread alone: who waits for the result waits forever, or leaves with the status of
    SystemExit(0), as if all was done. StopIteration is replaced too, because it ends the loop that reads. Called in the
    main thread, `read` may raise SystemExit and KeyboardInterrupt: they are the user's.
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
