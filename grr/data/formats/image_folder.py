"""A folder of images for each class, the layout of ImageNet."""

import os
from collections.abc import Iterator
from pathlib import Path

from grr.data.formats.rows import read_lines
from grr.data.images import SUFFIXES
from grr.data.labelled import CLASS_TEXT, Labelled, LabelledRow, labelled_rows
from grr.data.pairs import Row
from grr.data.records import Records


def image_folder(*, path: str, classes_from: str | None = None) -> Labelled:
    """Read a folder of images for each class, as in ImageNet: path/n01440764/n01440764_18.JPEG.

    The classes are the folders, sorted by name. `classes_from` replaces them by those of other data, in their order: it
    is the path of that data, or of a file with a line for each class, which holds the folder and, after a space, the
    name of the class if that differs (ImageNet's LOC_synset_mapping.txt). Raises FileNotFoundError if a path or all
    images are missing; ValueError if a folder is not one of the classes.
    """
    folders = list(_class_folders(path))
    class_of = _class_folders(path if classes_from is None else classes_from)
    if unknown := [folder for folder in folders if folder not in class_of]:
        raise ValueError(
            f"image_folder: each folder of {path} must be a class of {classes_from}, got {', '.join(unknown[:5])}; "
            "is it the folder of another data set?"
        )
    number = {folder: i for i, folder in enumerate(class_of)}
    records = Records()
    rows = (
        LabelledRow(Row(file, CLASS_TEXT, file), number[folder])
        for folder in folders
        for file in _images(path, folder, records)
    )
    labelled = labelled_rows(Path(path), rows, list(class_of.values()), records)
    records.log(f"image_folder: {path}")
    if not len(labelled):
        raise FileNotFoundError(
            f"image_folder: there are no images in {path}; it must hold a folder of images for each class"
        )
    return labelled


def _class_folders(path: str) -> dict[str, str]:
    """Returns the folder of each class, in order, with the name of the class."""
    if Path(path).is_dir():
        return {p.name: p.name for p in sorted(Path(path).iterdir()) if p.is_dir() and not p.name.startswith(".")}
    if not Path(path).is_file():
        raise FileNotFoundError(f"image_folder: there is neither a folder nor a file of classes {path}")
    lines = (line.strip().partition(" ") for _, line in read_lines("image_folder", Path(path)))
    return {folder: name.strip() or folder for folder, _, name in lines if folder}


def _images(path: str, folder: str, records: Records) -> Iterator[str]:
    """Yield the images of a class, sorted by name, at any depth, as paths relative to the folder of all classes."""
    visited = set[str]()
    for current, folders, files in os.walk(Path(path, folder), followlinks=True):
        if (real := os.path.realpath(current)) in visited:  # a link to a folder that was read
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        relative = Path(current).relative_to(path).as_posix()
        images = [file for file in sorted(files) if file.lower().endswith(SUFFIXES)]
        records.leave_out("not named as an image", len(files) - len(images))
        yield from (f"{relative}/{file}" for file in images)
