"""Rows of a text table: its encoding, separator and quoting, and the line number of each row for messages.

Comma and semicolon tables are quoted as by spreadsheets. Tab and | tables are not (CC12M, ROCO, Flickr30k), so a
quotation mark is an ordinary character there; a row that has the right number of fields only if it is read as quoted
is read as quoted.
"""

import codecs
import csv
import io
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from grr.data.images import SUFFIXES
from grr.files.regular import open_regular_file

SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "|"}
QUOTED = ",;"
IMAGE = (  # names of the column in any case; the first that the table has is used
    *("image", "file_name", "filename", "filepath", "file_path", "image_name", "image_path", "image_file"),
    *("img", "img_path", "path", "file", "image_id", "id"),
)
CAPTION = ("caption", "captions", "text", "title", "comment", "description", "sentence")
SPLIT = ("split",)
URL = ("url", "image_url")
MAX_LINE = 2**20  # characters
MAX_LINES = 1000  # of one quoted field in a table that is otherwise not quoted
REMEDY = "name the columns image and caption in the first line"

Line = tuple[int, str]  # number and text


class Columns(NamedTuple):
    """The names of the columns that are read."""

    image: str
    caption: str
    split: str | None


class Table(NamedTuple):
    """Header of a table: its separator and the names of its columns."""

    separator: str
    header: list[str]
    columns: Columns
    all_quoted: bool  # the names are quoted, so every field is


def read_lines(who: str, file: Path) -> Iterator[Line]:
    """Yield the lines of a UTF-8 file with their numbers, a byte order mark removed.

    Raises ValueError, naming the file and the line, for other encodings and for lines of more than MAX_LINE characters;
    OSError if the file is not a regular one.
    """
    with open_regular_file(file) as raw:
        start = raw.read(4)
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{who}: {file} must be UTF-8 text, got UTF-16; {_convert(file, 'UTF-16')}")
        raw.seek(0)
        with io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
            for number in itertools.count(1):
                try:
                    line = text.readline(MAX_LINE + 1)
                except UnicodeDecodeError:
                    raise _undecodable(who, file) from None
                if not line:
                    return
                if "\0" in line:
                    raise ValueError(
                        f"{who}: {file} line {number} must be text, got a NUL character; is the file UTF-16? "
                        + _convert(file, "UTF-16LE")
                    )
                if len(line) > MAX_LINE:
                    raise ValueError(
                        f"{who}: {file} line {number} is longer than {MAX_LINE:,} characters; is the file a table?"
                    )
                yield number, line


def read_table(who: str, file: Path, lines: Iterator[Line]) -> tuple[Table, Iterator[tuple[int, dict[str, str]]]]:
    """Read the header of a table, and return it with the rows: (number of the first line, {name: field}).

    Blank lines are skipped. Raises ValueError, naming the line, if the header does not name the columns, if a row has
    another number of fields than the header, or if a quotation mark is not closed.
    """
    _, first = next(lines, (1, ""))
    table = _table(who, file, first)
    return table, _rows(who, file, lines, table)


def read_objects(who: str, file: Path, lines: Iterable[Line]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON-lines file with their line numbers; keys are normalised as column names.

    Raises ValueError, naming the line, for anything that is not one object.
    """
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = {column_name(key): value for key, value in json.loads(line).items()}
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(
                f"{who}: {file} line {number} must be one JSON object, got {line.strip()[:80]!r}; "
                "write one object on each line"
            ) from None
        yield number, row


def find_columns(names: Iterable[str], where: str) -> Columns:
    """Returns the columns of image, caption and split among some names.

    Raises ValueError if the image or the caption column is missing or occurs twice.
    """
    names = list(names)
    image, caption, split = (next((n for n in known if n in names), None) for known in (IMAGE, CAPTION, SPLIT))
    if image is None and any(name in URL or name.startswith("http") for name in names):
        raise ValueError(
            f"{where} must name image files, got the columns {_listed(names)}; download the images with img2dataset, "
            "and read its shards with data.name=webdataset"
        )
    if image is None or caption is None:
        raise ValueError(
            f"{where} must name the columns image and caption, got {_listed(names)}; {REMEDY} (known names are "
            f"{', '.join(IMAGE[:6])} ... and {', '.join(CAPTION)})"
        )
    for name in (image, caption):
        if names.count(name) > 1:
            raise ValueError(f"{where} must name the column {name} once, got {_listed(names)}; rename the others")
    return Columns(image, caption, split)


def column_name(name: str) -> str:
    """Normalise the name of a column: lower case, _ between words."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _table(who: str, file: Path, first: str) -> Table:
    headers = {}
    for separator in SEPARATORS:
        try:
            fields = next(csv.reader([first], delimiter=separator, skipinitialspace=True), [])
        except csv.Error:
            fields = first.split(separator)
        headers[separator] = [column_name(field) for field in fields]
    fits = [s for s, header in headers.items() if set(header) & {*IMAGE, *URL} and set(header) & set(CAPTION)]
    separator = fits[0] if fits else max(headers, key=lambda s: len(headers[s]))
    columns = find_columns(headers[separator], f"{who}: {file} line 1")
    quoted = all(field.strip().startswith('"') for field in first.split(separator))
    return Table(separator, headers[separator], columns, quoted)


def _rows(who: str, file: Path, lines: Iterator[Line], table: Table) -> Iterator[tuple[int, dict[str, str]]]:
    records = _quoted(who, file, lines, table) if table.separator in QUOTED else _unquoted(who, file, lines, table)
    n = len(table.header)
    for number, fields in records:
        if len(fields) > n and not any(field.strip() for field in fields[n:]):
            fields = fields[:n]  # spreadsheets add separators after the last column
        if len(fields) != n:
            raise _wrong_number(who, file, number, fields, table)
        yield number, dict(zip(table.header, fields, strict=True))


def _quoted(who: str, file: Path, lines: Iterator[Line], table: Table) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a quoted table, each with the number of its first line."""
    numbers: list[int] = []  # of the lines of the current record

    def numbered() -> Iterator[str]:
        for number, line in lines:
            numbers.append(number)
            yield line

    reader = csv.reader(numbered(), delimiter=table.separator, skipinitialspace=True, strict=True)
    while True:
        numbers.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _open_quote(who, file, numbers[0], str(error)) from None
        if fields is None:
            return
        if len(numbers) > 1:
            _check_multiline(who, file, numbers[0], numbers[-1], fields, table)
        if len(fields) > 1 or "".join(fields).strip():
            yield numbers[0], fields


def _unquoted(who: str, file: Path, lines: Iterator[Line], table: Table) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a table without quoting.

    A record is a line, unless the line has the right number of fields only if it is read as quoted.
    """
    n, lookahead = len(table.header), Lookahead(lines)
    for number, line in lookahead:
        line = line.rstrip("\n")
        if not line.strip() and table.separator not in line:
            continue
        fields = line.split(table.separator)
        if len(fields) == n and ('"' not in line or _next_is(fields, lookahead.peek(), table) == "row"):
            yield number, [_unquote(field, table) for field in fields]
            continue
        quoted = _quoted_record(who, file, number, line, lookahead, table) if '"' in line else None
        if quoted is None and len(fields) == 2 == n - 1:
            quoted = _flickr30k(fields, table)
        yield number, fields if quoted is None else quoted


def _next_is(fields: list[str], following: str | None, table: Table) -> Literal["row", "more", "unclear"]:
    """Classify the line after some fields: a row, a continuation of the last field, or either."""
    if following is None:
        return "row"
    n, at = len(table.header), table.header.index(table.columns.image)
    parts = following.rstrip("\n").split(table.separator)
    if len(parts) < n:
        return "more"
    own, name = (row[at].strip(' "').lower() if len(row) > at else "" for row in (fields, parts))
    named = name.endswith(SUFFIXES) if own.endswith(SUFFIXES) else name and not set(name) & set(" \t")
    return "row" if named else "unclear"


class Lookahead:
    """Iterator over lines that can return the next line that is not blank without consuming it."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines, self._held = lines, deque[Line]()

    def __iter__(self) -> Iterator[Line]:
        while self._held or self._fetch():
            yield self._held.popleft()

    def peek(self) -> str | None:
        for _, line in self._held:
            if line.strip("\n"):
                return line
        while len(self._held) < MAX_LINES and self._fetch():
            if self._held[-1][1].strip("\n"):
                return self._held[-1][1]
        return None

    def take(self) -> Line:
        return self._held.popleft()

    def _fetch(self) -> bool:
        held = len(self._held)
        self._held += itertools.islice(self._lines, 1)
        return len(self._held) > held


def _quoted_record(who: str, file: Path, number: int, line: str, ahead: Lookahead, table: Table) -> list[str] | None:
    """Read the quoted record that begins with a line, over as many lines as it has; None if the line begins none.

    Raises ValueError if a record of several lines does not end before a line that could be a row.
    """
    n, text, last = len(table.header), line, number
    while True:
        try:
            fields = next(csv.reader(io.StringIO(text, newline=""), delimiter=table.separator, strict=True))
        except csv.Error as error:
            following = _next_is(line.split(table.separator), ahead.peek(), table)
            is_open = "end of data" in str(error)
            if is_open and following == "more" and last - number < MAX_LINES:
                last, further = ahead.take()
                text += "\n" + further.rstrip("\n")
                continue
            if last > number or (is_open and following != "row"):
                raise _open_quote(who, file, number, str(error)) from None
            return None
        if last > number:
            _check_multiline(who, file, number, last, fields, table)
        return fields if len(fields) == n or last > number else None


def _unquote(field: str, table: Table) -> str:
    """Remove the quotes of a field, if the table quotes all fields or the field has doubled quotation marks."""
    inner = field[1:-1]
    if len(field) < 2 or field[0] != '"' or field[-1] != '"' or '"' in inner.replace('""', ""):
        return field
    return inner.replace('""', '"') if table.all_quoted or '""' in inner else field


def _flickr30k(fields: list[str], table: Table) -> list[str] | None:
    """Split the row of Flickr30k's results.csv that has no separator after the number of its caption."""
    match = re.fullmatch(r"\s*(\d+)\s+(\S.*)", fields[1])
    return [fields[0], match[1], match[2]] if match and table.header[1:] == ["comment_number", "comment"] else None


def _check_multiline(who: str, file: Path, first: int, last: int, fields: list[str], table: Table) -> None:
    """Raise ValueError if a field over several lines has lines that look like rows, which the quotes would hide."""
    own = fields[table.header.index(table.columns.image)] if len(fields) == len(table.header) else ""
    own = re.sub(r"\d+", "0", own.rpartition("\n")[2].strip(' "'))  # names that differ only in digits look alike
    for line in (line for field in fields if "\n" in field for line in field.split("\n")):
        parts = [part.strip(' "') for part in line.split(table.separator)]
        names = [part for part in parts if part.lower().endswith(SUFFIXES) or own == re.sub(r"\d+", "0", part) != ""]
        if len(parts) > 1 and names:
            raise ValueError(
                f"{who}: {file} line {first} opens a quotation mark that line {last} closes, and between them "
                f"{line.strip()[:80]!r} looks like a row; double or remove the quotation mark of line {first}"
            )


def _open_quote(who: str, file: Path, number: int, error: str) -> ValueError:
    return ValueError(
        f"{who}: {file} line {number} must close each quotation mark that opens a field ({error}); put the field "
        "between quotation marks, and double those inside it"
    )


def _wrong_number(who: str, file: Path, number: int, fields: list[str], table: Table) -> ValueError:
    name, count = SEPARATORS[table.separator], f"{len(fields)} field{'s' * (len(fields) != 1)}"
    if table.separator in QUOTED:
        remedy = f"put captions with a {name} between quotation marks"
    else:
        remedy = f"remove the {name} from the caption" if len(fields) > len(table.header) else "correct the line"
    return ValueError(
        f"{who}: {file} line {number} has {count} and the header {len(table.header)} (separator: {name}); {remedy}"
    )


def _undecodable(who: str, file: Path) -> ValueError:
    with open_regular_file(file) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return ValueError(
                    f"{who}: {file} line {number} must be UTF-8 text, got the byte 0x{line[error.start]:02x} in column "
                    f"{error.start + 1}; {_convert(file, 'WINDOWS-1252')}, if it is Western European"
                )
    return ValueError(f"{who}: {file} must be UTF-8 text; save it as UTF-8")


def _convert(file: Path, encoding: str) -> str:
    return f"save it as UTF-8: iconv -f {encoding} -t UTF-8 {file.name}"


def _listed(names: list[str]) -> str:
    return "[" + ", ".join(repr(name[:40]) for name in names[:12]) + (", ...]" if len(names) > 12 else "]")
