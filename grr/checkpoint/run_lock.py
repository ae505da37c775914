"""The lock that keeps a run's folder to one writer."""

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Self

from grr.files.lock import is_locked, lock
from grr.parallel.process_group import on_rank_0


class RunLock:
    """Hold folder/.lock for this run until release, the end of a with statement, or the end of rank 0.

    patience: seconds to wait for a run that is about to end. To be made after the process group.
    Raises, on every rank, BlockingIOError if another run holds the folder, NotADirectoryError if it is a file.
    """

    def __init__(self, folder: Path, *, patience: float = 10.0) -> None:
        self._file: IO[str] | None = None
        on_rank_0(lambda: self._take(folder / ".lock", patience))

    def release(self) -> None:
        if self._file is not None:
            self._file.close()  # which releases the lock
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self, path: Path, patience: float) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            obstacle = next(part for part in (path.parent, *path.parents) if part.exists())
            raise NotADirectoryError(
                f"RunLock: run.folder, or the folder of an index or of results, must be a folder, and {obstacle} "
                "is a file; set another folder to write to"
            ) from None
        file = path.open("a+")
        deadline = time.monotonic() + patience
        while True:
            try:
                lock(file.fileno())
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise BlockingIOError(
                    f"RunLock: {path.parent} is being written by {holder}; "
                    "wait for that run, end it (kill the process), or set another folder to write to"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file


def refuse_other_writers(files: Iterable[Path], *, patience: float = 10.0) -> None:
    """Raise BlockingIOError if a process of an earlier run, whose rank 0 has ended, still holds one of the files.

    patience: seconds to wait for such a process, which may be about to end.
    """
    deadline = time.monotonic() + patience
    for file in files:
        while is_locked(file):
            if time.monotonic() > deadline:
                raise BlockingIOError(
                    f"refuse_other_writers: {file} must have no writer, got one of an earlier run, whose first process "
                    "has ended; end that process, or wait for it"
                )
            time.sleep(0.1)
