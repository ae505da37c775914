"""Regular files, opened without blocking and read up to a limit; other kinds of files are refused."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# of POSIX: opening does not block, or make a terminal the process's own; of Windows: bytes as they are
FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular_file(path: str | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    A pipe, socket, device or folder is not opened: opening a pipe blocks until it has a writer, and opening a device
    may have effects. Raises OSError, with the reason in `strerror`, for these and for a file that cannot be opened.
    """
    _check_regular(os.stat(path), path)
    descriptor = os.open(path, FLAGS)
    try:
        _check_regular(os.fstat(descriptor), path)  # the path may have been replaced since os.stat
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular_file(path: str | Path, max_bytes: int) -> bytes:
    """Read a regular file of at most max_bytes bytes.

    Raises OSError, with the reason in `strerror`, as `open_regular_file` does, and if the file is larger, also where
    its stated size is wrong: files of /proc state 0 bytes.
    """
    with open_regular_file(path) as file:
        stated = os.fstat(file.fileno()).st_size
        if stated > max_bytes:
            raise _too_large(f"{stated:,}", max_bytes, path)
        parts, size = list[bytes](), 0
        while part := os.read(file.fileno(), max(stated - size, 65_536)):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                raise _too_large(f"more than {max_bytes:,}", max_bytes, path)
    return b"".join(parts)


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise OSError(errno.EINVAL, f"must be a regular file, but is {kind}", str(path))


def _too_large(size: str, max_bytes: int, path: str | Path) -> OSError:
    return OSError(errno.EFBIG, f"has {size} bytes; at most {max_bytes:,} are read", str(path))
