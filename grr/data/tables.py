"""Captions in a table: a folder of images with a CSV, TSV or JSON-lines file, and ROCOv2."""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from grr.data.pairs import Pairs, image_files, place, split_name, threshold

FILES = ("captions.csv", "captions.tsv", "captions.jsonl", "captions.txt")
IMAGE = ("image", "file", "filename", "file_name", "image_name", "id")  # names of the column, in any case
CAPTION = ("caption", "text", "comment")
SPLIT = ("split",)
TOKEN_LINE = re.compile(r"[^\t]+#\d+\t")  # Flickr's own: name#0 TAB caption

Row = tuple[str, object, str | None]  # image, caption, split


def folder(*, path: str, split: str | None = None, validation_fraction: float = 0.05) -> Pairs:
    """A folder of images with one file of captions: captions.csv, .tsv, .jsonl or .txt, or Flickr's *.token file.

    The columns are called image (or file, filename, file_name) and caption (or text), and an optional third one split.
    Without it, split "train" or "validation" is drawn by a hash of the image's name, so that an image that is added
    moves no other; split null takes all. Images lie in the folder or in its images/. Tables are UTF-8, quoted as
    spreadsheets do. Raises FileNotFoundError if something is not there, ValueError if the table is none.
    """
    file = _captions_file(Path(path))
    wanted = None if split is None else split_name("folder", split)
    below = threshold("folder", validation_fraction)

    def belongs(image: str, own: str | None) -> bool:
        if own is not None:
            return split_name(f"folder: {file}", own.strip().lower()) == wanted
        if wanted == "test":
            raise ValueError(f'folder: {file} has no column split, so split must be train or validation, got "test"')
        return (place(image) < below) == (wanted == "validation")

    rows = ((image, caption) for image, caption, own in _rows(file) if wanted is None or belongs(image, own))
    names = [image for image, _, _ in itertools.islice(_rows(file), 100)]
    pairs = image_files(_root("folder", [Path(path), Path(path, "images"), Path(path, "Images")], names), rows)
    if not len(pairs):
        raise ValueError(f"folder: {file} has no captions for {split=}; add rows, or change validation_fraction")
    return pairs


def rocov2(*, path: str, split: str) -> Pairs:
    """Radiology images with captions, ROCOv2 (Rückert et al. 2024), as it unpacks: {split}_captions.csv, header
    ID,Caption, and {split}_images/{split}/{ID}.jpg, the splits called train, valid and test.

    Raises FileNotFoundError if something is not there, ValueError if the table is none.
    """
    own = {"train": "train", "validation": "valid", "test": "test"}[split_name("rocov2", split)]
    file = Path(path, f"{own}_captions.csv")
    if not file.is_file():
        raise FileNotFoundError(f"rocov2: there is no file {file}; path must be the folder that holds it")
    names = [f"{image}.jpg" for image, _, _ in itertools.islice(_rows(file), 100)]
    roots = [Path(path, f"{own}_images", own), Path(path, f"{own}_images"), Path(path, own)]
    return image_files(_root("rocov2", roots, names), ((f"{image}.jpg", caption) for image, caption, _ in _rows(file)))


def _captions_file(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {path}")
    files = sorted(p for p in path.iterdir() if p.name.lower() in FILES or ".token" in p.name)
    if len(files) != 1:
        raise FileNotFoundError(
            f"folder: {path} must hold one of {', '.join(FILES)}, found {[p.name for p in files] or 'none'}; "
            "write a captions.csv with the columns image and caption"
        )
    return files[0]


def _root(who: str, folders: list[Path], names: list[str]) -> Path:
    """The first folder that holds one of the images."""
    if not names:
        raise ValueError(f"{who}: the table in {folders[0]} names no image; add a row for each caption")
    for root in folders:
        if any((root / name).is_file() for name in names):
            return root
    raise FileNotFoundError(
        f"{who}: the first {len(names)} images of the table ({', '.join(names[:3])} ...) are in none of "
        f"{', '.join(map(str, folders))}; are the images unpacked there, and named with their extension?"
    )


def _rows(file: Path) -> Iterator[Row]:
    read: Callable[[TextIO, Path], Iterator[Row]] = _json_rows if file.suffix.lower() == ".jsonl" else _table_rows
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from read(lines, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: must be UTF-8 text ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(
            f"{file}: is not a table ({error}); is a quotation mark open? double those in captions"
        ) from error


def _json_rows(lines: TextIO, file: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = {str(key).lower(): value for key, value in json.loads(line).items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: must be one JSON object, got {line.strip()[:80]!r}") from error
        image, caption, split = _columns(list(row), f"{file}, line {number}")
        yield str(row[image]), row[caption], None if split is None else str(row[split])


def _table_rows(lines: TextIO, file: Path) -> Iterator[Row]:
    first = lines.readline()
    lines.seek(0)
    if TOKEN_LINE.match(first):
        for line in lines:
            name, _, caption = line.partition("\t")
            if name.strip():
                yield name.rpartition("#")[0], caption, None
        return
    table = csv.reader(lines, delimiter="\t" if "\t" in first else ",")
    header = [name.strip().lower() for name in next(table, [])]
    image, caption, split = _columns(header, str(file))
    for row in table:
        if len(row) > len(header):
            raise ValueError(
                f"{file}, line {table.line_num}: has {len(row)} columns, the header {len(header)}; "
                "put captions with commas between quotation marks"
            )
        if row:
            named = dict(itertools.zip_longest(header, row, fillvalue=""))
            yield named[image], named[caption], None if split is None else named[split]


def _columns(header: list[str], where: str) -> tuple[str, str, str | None]:
    image, caption, split = (next((n for n in names if n in header), None) for names in (IMAGE, CAPTION, SPLIT))
    if image is None or caption is None:
        raise ValueError(
            f"{where}: must name the columns image and caption, got {header}; write them in the first line"
        )
    return image, caption, split
