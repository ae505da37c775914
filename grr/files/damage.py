"""Diagnosis of weight files that cannot be read."""

import struct
from pathlib import Path

from grr.files.regular import open_regular_file

HEAD = 1024  # bytes from which the kind of a file is recognised


def damage(file: Path) -> str:
    """Returns the likely reason why a weight file cannot be read, and the remedy.

    The reason follows from its first bytes and its size: a Git LFS pointer, a web page that a server sent in place of
    the file, an empty or truncated file, or another format than that of its suffix.
    """
    with open_regular_file(file) as content:
        head = content.read(HEAD)
    size, again = file.stat().st_size, "download or copy it again"
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return f"it is a Git LFS pointer of {size} bytes, not the weights; run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"it is a web page, not the weights; {again} from the address of the file itself"
    if not size:
        return f"it is empty; {again}"
    if file.suffix == ".safetensors":
        if head.startswith((b"PK", b"\x80")):
            return "it was written by torch.save; name it .pt, or save it as .safetensors"
        header = struct.unpack("<Q", head[:8])[0] if size >= 8 else 0
        if head[8:9] == b"{" and 8 + header >= size:
            return f"it is truncated: its header has {header:,} bytes and the file {size:,}; {again}"
        return f"it is truncated or damaged, at {size:,} bytes; {again}"
    if head[8:9] == b"{" and not head.startswith((b"PK", b"\x80")):
        return "it is a safetensors file; name it .safetensors"
    if head.startswith(b"PK") and b"PK\x05\x06" not in _tail(file):
        return f"it is truncated, at {size:,} bytes; {again}"
    return f"it is damaged, or holds more than weights, which is not run; {again}, as .safetensors if there is one"


def _tail(file: Path) -> bytes:
    """Returns the last bytes, which hold the directory of a zip archive."""
    with open_regular_file(file) as content:
        content.seek(max(0, file.stat().st_size - 2**16))
        return content.read()
