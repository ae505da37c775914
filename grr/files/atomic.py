"""Atomic replacement of files and folders: after a kill or a power failure, the old or the new version exists."""

import os
import shutil
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically: to NAME.tmp beside it, flushed to disk (fsync), and then renamed.

    A text is written as UTF-8. A missing folder is created. Only one process at a time may write a name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    replace_file(aside, path)


def replace_file(aside: Path, path: Path) -> None:
    """Flush a file that was written beside `path` to disk, and rename it to `path`."""
    fsync(aside)
    aside.replace(path)
    fsync(path.parent)


def replace_folder(aside: Path, folder: Path) -> None:
    """Replace `folder` by a folder whose files are on disk; one of folder, aside and folder.old is always complete."""
    fsync(aside)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
