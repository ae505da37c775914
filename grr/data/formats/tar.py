"""Reader of uncompressed tar files that yields every member and continues after damage.

The tarfile module stops without an error at a header that it cannot read, and recurses into long headers.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 2**16  # bytes of a long name, or of the extended header of a member
SEARCHED = 2**20  # bytes per read in the search for a header
FOLDER = "a folder"
ODD = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: FOLDER,
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
LONG_NAME, LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class Member(NamedTuple):
    """Member of a tar file. fault: the reason why its content cannot be used, empty for a regular file."""

    name: str
    offset: int  # of its content, bytes
    size: int
    fault: str


class Damage(NamedTuple):
    """Part of a tar file that cannot be read as a member."""

    offset: int
    reason: str


def read_members(file: BinaryIO) -> Iterator[Member | Damage]:
    """Yield the members of a tar file in their order, and the damage between them or at the end.

    After damage, the next header with a valid checksum is searched for. A member that would extend beyond the end of
    the file, or whose size is negative, has a fault if others follow it; otherwise the file was truncated there. Only
    headers are read: content is skipped. Zeros in the place of a header are the end of an archive, after which another
    may have been appended, or damage (`_is_end`).
    """
    end = os.fstat(file.fileno()).st_size
    if end == 0:
        yield Damage(0, "the file is empty")
    offset, archive, extra = 0, 0, ExtraHeaders()
    while offset < end:
        header, reason = _header(file, offset)
        if header is None and not reason:
            following = _next_header(file, offset + BLOCK, end)
            if _is_end(file, archive, offset, following, end):
                archive = following
            else:
                yield Damage(offset, "zeros in the place of a header")
            offset, extra = following, ExtraHeaders()
            continue
        content = None if header is None else _content(file, offset, header, extra)
        if header is None or content is None or content[0] + content[1] > end:
            following = _next_header(file, offset + BLOCK, end)
            if header is not None and following < end:
                yield Member(extra.name or header.name, 0, 0, "its size cannot be true")
            else:
                yield Damage(offset, reason or "it was cut off within a member")
            offset, extra = following, ExtraHeaders()
            continue
        start, size = content
        if header.type in (LONG_NAME, LONG_LINK, tarfile.XGLTYPE, *EXTENDED):
            extra.read(file, header.type, start, size)
        else:
            yield Member(extra.name or header.name, start, size, extra.fault or _fault(header))
            extra = ExtraHeaders()
        offset = start + -(-size // BLOCK) * BLOCK


def _is_end(file: BinaryIO, archive: int, offset: int, following: int, end: int) -> bool:
    """Returns whether the zeros at an offset are the end of the archive that began at `archive`.

    Its end is two blocks of zeros, which most writers pad to a multiple of RECORDSIZE. Nothing else may lie between
    them and the following header, or the end of the file.
    """
    if following < end and following - offset != 2 * BLOCK and (following - archive) % tarfile.RECORDSIZE:
        return False
    starts = range(offset, following, SEARCHED)
    return not any(_read(file, start, min(SEARCHED, following - start)).strip(b"\0") for start in starts)


class ExtraHeaders:
    """Name, size and fault of a member from the extra headers before it (GNU long names, pax)."""

    def __init__(self) -> None:
        self.name = self.size = self.fault = ""

    def read(self, file: BinaryIO, kind: bytes, start: int, size: int) -> None:
        """Read the content of an extra header."""
        if kind in (LONG_LINK, tarfile.XGLTYPE):
            return
        if size > MAX_HEADER:
            self.fault = f"its long header has more than {MAX_HEADER:,} bytes"
        elif kind == LONG_NAME:
            self.name = _text(_read(file, start, size).rstrip(b"\0"))
        else:
            records = _extended(_read(file, start, size))
            self.name = records.get("path", self.name)
            self.size = records.get("size", "")
            if any(key.startswith("GNU.sparse") for key in records):
                self.fault = ODD[tarfile.GNUTYPE_SPARSE]


def _header(file: BinaryIO, offset: int) -> tuple[tarfile.TarInfo | None, str]:
    """Returns the header at an offset, or None and the reason; the reason is empty for a block of zeros."""
    block = _read(file, offset, BLOCK)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"), ""
    except tarfile.HeaderError as error:
        return None, "" if not block.strip(b"\0") and len(block) == BLOCK else f"no header of a member ({error})"
    except (ValueError, OverflowError) as error:
        return None, f"no header of a member ({error})"


def _content(file: BinaryIO, offset: int, header: tarfile.TarInfo, extra: ExtraHeaders) -> tuple[int, int] | None:
    """Returns the offset and the size of a member's content in bytes; None if the size is negative."""
    start, size = offset + BLOCK, header.size
    if header.type in REGULAR and extra.size:
        size = int(extra.size) if extra.size.isdecimal() and len(extra.size) < 20 else -1
    elif header.type == tarfile.GNUTYPE_SPARSE:  # blocks with the map of holes precede the content
        more = _read(file, offset, BLOCK)[482:483].strip(b"\0")
        while more:
            more = _read(file, start, BLOCK)[504:505].strip(b"\0")
            start += BLOCK
    elif header.type in ODD:  # links, folders and devices have no content
        size = 0
    return None if size < 0 else (start, size)


def _fault(header: tarfile.TarInfo) -> str:
    return "" if header.type in REGULAR else ODD.get(header.type, "of an unknown type")


def _extended(content: bytes) -> dict[str, str]:
    """Parse an extended header (pax), lines of "length key=value", up to the first damaged record."""
    records = {}
    while content:
        length = content.partition(b" ")[0]
        if not (length.isdigit() and len(length) < 9 and len(length) < int(length) <= len(content)):
            break
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        content = content[int(length) :]
    return records


def _next_header(file: BinaryIO, offset: int, end: int) -> int:
    """Returns the offset of the next header with a valid checksum; the file's end if there is none."""
    while offset < end:
        part = _read(file, offset, SEARCHED)
        for start in range(0, len(part), BLOCK):
            block = part[start : start + BLOCK]
            if block[257:262] != b"ustar":  # a fast test; all current writers have this magic number
                continue
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError, OverflowError):
                continue
            return offset + start
        offset += max(len(part), BLOCK)
    return end


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
