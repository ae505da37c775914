"""Digests of files."""

import hashlib
from pathlib import Path


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
