"""Locks of open files and folders, which end with the process that holds them."""

import errno

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
