"""Files of named arrays that processes map into memory: the processes of a host share one copy, the page cache.

A file is MAGIC, the length of the header in 8 bytes, the header (JSON: name -> dtype, count, place), and the arrays,
whose places are counted from the first multiple of ALIGN after the header.
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from grr.files.regular import open_regular_file

MAGIC = b"grrcols1"
ALIGN = 64  # bytes: arrays begin at multiples
MAX_HEADER = 2**20  # bytes

Part = Mapping[str, NDArray[Any]]


def write_columns(file: BinaryIO, columns: Mapping[str, tuple[DTypeLike, int]], parts: Iterable[Part]) -> None:
    """Write arrays to an empty file, part by part.

    columns: dtype and total count of each array. parts: each holds the next elements of all of them, some of which may
    be empty. Raises ValueError if the parts have another total.
    """
    dtypes = {name: np.dtype(dtype) for name, (dtype, _) in columns.items()}
    places, size = dict[str, int](), 0  # relative to the end of the header
    for name, (_, count) in columns.items():
        places[name] = _aligned(size)
        size = places[name] + dtypes[name].itemsize * count
    header = json.dumps({name: [dtypes[name].str, columns[name][1], places[name]] for name in columns}).encode()
    file.write(MAGIC + len(header).to_bytes(8, "little") + header)
    begin = _aligned(len(MAGIC) + 8 + len(header))
    file.truncate(begin + size)
    places = {name: begin + place for name, place in places.items()}
    ends = {name: place + dtypes[name].itemsize * columns[name][1] for name, place in places.items()}
    for part in parts:
        for name, array in part.items():
            content = np.ascontiguousarray(array, dtype=dtypes[name])
            if places[name] + content.nbytes > ends[name]:
                raise ValueError(f"write_columns: {name} must have {columns[name][1]:,} elements, got more")
            file.seek(places[name])
            file.write(content.data)
            places[name] += content.nbytes
    if places != ends:
        raise ValueError(f"write_columns: arrays must have the stated counts, got less; {ends=}, {places=}")


def map_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Map the arrays of a file into memory, read only; they keep their content if the file is replaced or deleted.

    Raises ValueError for a file that `write_columns` did not write or that was cut off, OSError if it cannot be read.
    """
    with open_regular_file(path) as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(content[8:16], "little")
    if content[:8] != MAGIC or length > MAX_HEADER:
        raise ValueError(f"map_columns: {path} is not a file of columns")
    header, begin = json.loads(content[16 : 16 + length]), _aligned(16 + length)
    return {
        name: np.frombuffer(content, dtype=np.dtype(dtype), count=count, offset=begin + place)
        for name, (dtype, count, place) in header.items()
    }


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
