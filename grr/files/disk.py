"""Disk errors, raised with the error number of the system."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise OSError with its number and this path where a library raises another error for a failed write.

    On a full disk torch raises RuntimeError ("unexpected pos 704 vs 598") while it handles the OSError, and safetensors
    raises SafetensorError with the number in its text. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        remedy = f"; free some space, then start the same command again (OSError {number})" if number in FULL else ""
        raise OSError(number, os.strerror(number) + remedy, str(path)) from error


def _errno(error: BaseException | None) -> int | None:
    """Returns the system's number of an error or of one that it was raised from; None without a number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None
