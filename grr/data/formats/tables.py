"""Captions in a table or in text files beside a folder of images: CSV, TSV, JSON lines; ROCOv2, DOCCI, Urban1k."""

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from grr.data.formats.rows import SEPARATORS, find_columns, read_lines, read_objects, read_table
from grr.data.images import SUFFIXES
from grr.data.pairs import ImageFiles, Pairs, Row, image_files, image_path, split_name, threshold
from grr.data.records import Records, file_name
from grr.seeds import stable_hash

FILES = (
    *("captions.csv", "captions.tsv", "captions.jsonl", "captions.txt"),
    *("metadata.csv", "metadata.jsonl"),  # of Hugging Face
    "results.csv",  # of Flickr30k on Kaggle
)
FIRST = 100  # images of which one must exist
TOKEN_LINE = re.compile(r"([^\t]+)#\d+\t(.*)")  # of Flickr30k's *.token file: name#0 TAB caption

logger = logging.getLogger(__name__)


def folder(*, path: str, split: str | None = None, validation_fraction: float = 0.05) -> Pairs:
    """Read a folder of images with one table of captions: captions.csv, .tsv, .jsonl or .txt, Hugging Face's
    metadata.csv or metadata.jsonl, Flickr30k's results.csv, or Flickr's *.token file.

    The separator is taken from the first line: comma, semicolon, tab or |. The columns are named image (or file_name,
    filename, filepath, image_name ...) and caption (or text, title, comment ...), with an optional third one, split.
    Without it, split "train" or "validation" is determined by a hash of the image's name, so that adding an image does
    not move others; split null is all rows. Images are in the folder or in one folder below it. Tables are UTF-8. In
    JSON a caption is a string or a list of strings, which are all captions of the image.

    Every row is read, or counted in `records` with a reason. Raises FileNotFoundError if the table or all images are
    missing; ValueError, naming the line, if a row cannot be parsed.
    """
    file = _captions_file(Path(path))
    wanted = None if split is None else split_name("folder", split)
    limit = threshold("folder", validation_fraction)

    def belongs(row: Row) -> bool:
        if row.split is not None:
            return split_name(row.where, row.split.strip().lower()) == wanted
        if wanted == "test":
            raise ValueError(f'folder: {file} has no column split, so split must be train or validation, got "test"')
        return (stable_hash(row.image) < limit) == (wanted == "validation")

    rows = _rows("folder", file)
    pairs = _image_files("folder", file, rows, _roots(Path(path)), None if wanted is None else belongs)
    if not len(pairs):
        raise ValueError(f"folder: {file} has no captions for {split=}; add rows, or change validation_fraction")
    return pairs


def rocov2(*, path: str, split: str) -> Pairs:
    """Read ROCOv2 (Rückert et al. 2024), radiology images with captions, as it unpacks: {split}_captions.csv with the
    header ID,Caption, and {split}_images/{split}/{ID}.jpg, for the splits train, valid and test.

    Raises FileNotFoundError if the table or all images are missing; ValueError, naming the line, if a row cannot be
    parsed.
    """
    name = {"train": "train", "validation": "valid", "test": "test"}[split_name("rocov2", split)]
    file = Path(path, f"{name}_captions.csv")
    if not file.exists():
        raise FileNotFoundError(f"rocov2: there is no file {file}; path must be the folder that holds it")
    roots = [Path(path, f"{name}_images", name), Path(path, f"{name}_images"), Path(path, name)]
    rows = (row._replace(image=row.image and f"{row.image}.jpg") for row in _rows("rocov2", file))
    return _image_files("rocov2", file, rows, roots)


def docci(*, path: str, split: Literal["train", "test", "qual_dev", "qual_test"] = "test") -> Pairs:
    """Read DOCCI (Onoe et al. 2024), photographs with long descriptions, as it is distributed: path is the folder that
    holds docci_descriptions.jsonlines and images/, which docci_images.tar.gz unpacks.

    Raises FileNotFoundError if the file or all images are missing; ValueError, naming the line, if one has another
    content, or if the split is empty.
    """
    files = [Path(path, f"docci_descriptions.{suffix}") for suffix in ("jsonlines", "jsonl")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise FileNotFoundError(f"docci: there is no file {files[0]}; path must be the folder that holds it")
    rows = _object_rows("docci", file, read_lines("docci", file))
    own_first = iter(sorted(rows, key=lambda row: row.split != split))  # images of other splits may be missing
    pairs = _image_files("docci", file, own_first, [Path(path, "images"), Path(path)], lambda row: row.split == split)
    if not len(pairs):
        raise ValueError(f"docci: {file} has no descriptions for {split=}; is it another file?")
    return pairs


def urban1k(*, path: str) -> Pairs:
    """Read Urban1k (Zhang et al. 2024, Long-CLIP), street scenes with long captions: path is its folder, with
    image/NAME.jpg and, for each, caption/NAME.txt, of which the first line is the caption.

    An image without a caption and a caption without an image are skipped and counted. Raises FileNotFoundError if a
    folder or all images are missing; ValueError, naming the file, if a caption is not UTF-8.
    """
    folders = Path(path, "image"), Path(path, "caption")
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise FileNotFoundError(f"urban1k: there is no folder {missing[0]}; path must hold image/ and caption/")
    images = {file.stem: file.name for file in sorted(folders[0].iterdir()) if file.name.lower().endswith(SUFFIXES)}
    captions = {file.stem: file for file in sorted(folders[1].glob("*.txt"))}
    records = Records()
    for name in sorted(images.keys() ^ captions.keys()):
        records.skip(name, "image without a caption" if name in images else "caption without an image")
    both = [name for name in captions if name in images]
    if not both:
        raise FileNotFoundError(f"urban1k: no file of {folders[0]} has the name of one of {folders[1]}, without suffix")

    def rows() -> Iterator[Row]:
        for name in both:
            _, first = next(read_lines("urban1k", captions[name]), (1, ""))
            yield Row(images[name], first, f"urban1k: {captions[name]}")

    pairs = image_files(folders[0], rows(), records)
    records.log(f"urban1k: {path}")
    return pairs


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


def _roots(path: Path) -> list[Path]:
    """Returns the folders that may hold the images: the folder itself, images/, and its other subfolders."""
    return [path, path / "images", *sorted(p for p in path.iterdir() if p.is_dir() and p.name != "images")]


def _image_files(
    who: str, file: Path, rows: Iterator[Row], roots: list[Path], belongs: Callable[[Row], bool] | None = None
) -> ImageFiles:
    """Returns the pairs of a table of image files."""
    first = list(itertools.islice(rows, FIRST))
    names = [file_name(row.image) for row in first]
    root = _root(who, file, roots, [name for name in names if name])
    pairs = image_files(root, itertools.chain(first, rows), belongs=belongs)
    assert pairs.records is not None
    pairs.records.log(f"{who}: {file}")
    return pairs


def _root(who: str, file: Path, folders: list[Path], names: list[str]) -> Path:
    """Returns the first folder that holds one of the images."""
    if not names:
        raise ValueError(f"{who}: the table in {file} has no image names; add a row for each caption")
    for root in folders:
        if any(os.path.isfile(image_path(root, name)) for name in names):
            return root
    raise FileNotFoundError(
        f"{who}: the first {len(names)} images of the table ({', '.join(names[:3])} ...) are in none of "
        f"{', '.join(map(str, folders))}; are the images unpacked there, and named with their extension?"
    )


def _rows(who: str, file: Path) -> Iterator[Row]:
    lines = read_lines(who, file)
    if file.suffix.lower() == ".jsonl":
        yield from _object_rows(who, file, lines)
        return
    first = next(lines, (1, ""))
    lines = itertools.chain([first], lines)
    if TOKEN_LINE.fullmatch(first[1].rstrip("\n")):
        yield from _token_rows(who, file, lines)
        return
    table, rows = read_table(who, file, lines)
    image, caption, split = table.columns
    message = "%s: %s: separator %s; images from the column %s, captions from %s"
    logger.info(message, who, file, SEPARATORS[table.separator], image, caption)
    for number, fields in rows:
        row_split = fields[split] if split else None
        yield Row(fields[image].strip(), fields[caption], f"{who}: {file} line {number}", row_split)


def _object_rows(who: str, file: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    """Yield the rows of a JSON-lines file."""
    for number, row in read_objects(who, file, lines):
        where = f"{who}: {file} line {number}"
        image, caption, split = find_columns(row, where)
        row_split = row[split] if split else None
        for name, value in ((image, row[image]), (split, "" if row_split is None else row_split)):
            if not isinstance(value, str):
                raise ValueError(f"{where}: {name} must be a string, got {value!r}; write it as one")
        yield Row(row[image], row[caption], where, row_split)


def _token_rows(who: str, file: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    """Yield the rows of Flickr30k's *.token file."""
    for number, line in lines:
        match = TOKEN_LINE.fullmatch(line.rstrip("\n"))
        if match is not None:
            yield Row(match[1], match[2], f"{who}: {file} line {number}")
        elif line.strip():
            raise ValueError(
                f"{who}: {file} line {number} must be a name, #, a number, a tab and a caption, got "
                f"{line.strip()[:80]!r}; correct the line"
            )
