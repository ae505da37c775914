"""Files and folders that are replaced whole: after a kill or a power failure, the old or the new one is there."""

import os
import shutil
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: beside it as NAME.tmp, on disk (fsync), and then renamed.

    A text is written as UTF-8. The folder is made if it is missing. Only one process at a time may write a name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    replace_file(aside, path)


def replace_file(aside: Path, path: Path) -> None:
    """Rename a file that was written beside `path` to `path`, once its content is on disk."""
    fsync(aside)
    aside.replace(path)
    fsync(path.parent)


def replace_folder(aside: Path, folder: Path) -> None:
    """Put a folder whose files are on disk in the place of `folder`; folder, aside or folder.old is always whole."""
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
