"""Locks of open files and folders, which end with the process that holds them."""

import errno
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(descriptor: int, *, wait: bool = False) -> None:
    """Lock an open file or folder against other processes of this machine until it is closed.

    Raises BlockingIOError if another process holds it and wait is false; OSError where the system, or the file system,
    has no such locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has no locks of files (fcntl); use Linux, macOS or WSL to train")
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def is_locked(path: Path) -> bool:
    """Returns whether a process of this machine holds the lock of a file; false if the file does not exist."""
    try:
        with path.open() as file:
            lock(file.fileno())
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
