"""Regular files: what a name in somebody's table may point to, opened without waiting and read up to a limit."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a link to one is followed.

    A pipe, socket, device or folder is not opened: a pipe waits for a writer, a device may act on being opened. Raises
    OSError, with the reason in `strerror`, for these and for a file that cannot be opened.
    """
    _check_regular(os.stat(path), path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _check_regular(os.fstat(descriptor), path)  # the name may point elsewhere by now
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular_file(path: str | Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most max_bytes bytes.

    Raises OSError, with the reason in `strerror`, as `open_regular_file` does, and if the file is larger, whatever size
    it states: files of /proc state none.
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
