"""Captions in one JSON file: COCO's layout, and Karpathy's splits of Flickr30k and COCO."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grr.data.pairs import ImageFiles, Pairs, Row, image_files, image_path, split_name
from grr.data.records import Records
from grr.files.regular import read_regular_file

MAX_BYTES = 2**32  # of a JSON file
FIRST = 100  # images of which one must exist


def coco(*, annotations: str, images: str) -> Pairs:
    """Read COCO captions: annotations is a captions_*.json, images the folder of its files (such as train2017/).

    A record is an annotation, or an image without one; an annotation of an image that is not listed is skipped.
    Raises FileNotFoundError if the file or all images are missing; ValueError, naming the entry, if it has another
    content.
    """
    content = read_annotations("coco", annotations, images, ("images", "annotations"))
    who, records = f"coco: {annotations}", Records()
    names: dict[object, str] = {}
    for j, image in enumerate(objects_in(who, content, "images")):
        where = f"{who} images[{j}]"
        number, name = value_of(image, "id", (int, str), where), value_of(image, "file_name", (str,), where)
        if names.setdefault(number, name) != name:
            raise ValueError(
                f"{where} must have a unique id, got {number!r}, which {names[number]!r} has too; is the file a "
                "mixture of two?"
            )
    without_caption = set(names)

    def rows() -> Iterator[Row]:
        for j, annotation in enumerate(objects_in(who, content, "annotations")):
            where = f"{who} annotations[{j}]"
            number = value_of(annotation, "image_id", (int, str), where)
            if "caption" not in annotation:
                raise ValueError(
                    f"{where} must have a caption, got {sorted(annotation)}; files of instances and keypoints have "
                    "none, use a captions_*.json"
                )
            if number in names:
                without_caption.discard(number)
                yield Row(names[number], annotation["caption"], where)
            else:
                records.skip(where, "image_id is not listed")

    pairs = image_files(Path(images), rows(), records)
    for number in sorted(without_caption, key=str):
        records.skip(names[number], "image without a caption")
    check_images_exist("coco", annotations, pairs)
    return pairs


def karpathy(*, annotations: str, images: str, split: str) -> Pairs:
    """Read a split of Karpathy and Fei-Fei (2015): annotations is dataset_flickr30k.json, dataset_flickr8k.json or
    dataset_coco.json, images the folder of the files, for COCO the one that holds train2014/ and val2014/.

    split is train, validation or test; COCO's restval belongs to train. Raises FileNotFoundError if the file or all
    images are missing; ValueError, naming the entry, if the file has another content.
    """
    content = read_annotations("karpathy", annotations, images, ("images",))
    wanted = split_name("karpathy", split)
    who = f"karpathy: {annotations}"

    def rows() -> Iterator[Row]:
        for j, image in enumerate(objects_in(who, content, "images")):
            where = f"{who} images[{j}]"
            name, row_split = (value_of(image, key, (str,), where) for key in ("filename", "split"))
            folder = image.get("filepath") and value_of(image, "filepath", (str,), where)
            sentences = value_of(image, "sentences", (list,), where)
            raw = [value_of(sentence, "raw", (str,), f"{where}.sentences[{k}]") for k, sentence in enumerate(sentences)]
            yield Row(f"{folder}/{name}" if folder else name, raw, where, row_split)

    pairs = image_files(Path(images), rows(), None, lambda row: split_name(row.where, str(row.split)) == wanted)
    check_images_exist("karpathy", annotations, pairs)
    return pairs


def read_annotations(who: str, annotations: str, images: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON file that must hold an object with these keys. Raises FileNotFoundError or ValueError."""
    if not Path(annotations).exists():
        raise FileNotFoundError(f"{who}: there is no annotations file {annotations}")
    if not Path(images).is_dir():
        raise FileNotFoundError(f"{who}: there is no image folder {images}")
    try:
        content = json.loads(read_regular_file(annotations, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{who}: {annotations} is not JSON ({error}); unpack or download it again") from error
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise ValueError(f"{who}: {annotations} must hold an object with {' and '.join(keys)}; is it another file?")
    return content


def objects_in(who: str, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Returns the list of objects under a key. Raises ValueError, naming the entry, if it is not one."""
    items = content[key]
    if not isinstance(items, list):
        raise ValueError(f"{who} {key} must be a list of objects, got {str(items)[:80]!r}; is it another file?")
    for j, item in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(f"{who} {key}[{j}] must be an object, got {str(item)[:80]!r}; is it another file?")
    return items


def value_of(item: Any, key: str, kinds: tuple[type, ...], where: str) -> Any:
    """Returns the value of an object's key, which must have one of these types. Raises ValueError, naming the entry."""
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join({int: "a whole number", str: "a string", list: "a list"}[kind] for kind in kinds)
        raise ValueError(f"{where} must have {key}, {names}, got {str(value)[:80]!r}; is it another file?")
    return value


def check_images_exist(who: str, annotations: str, pairs: Pairs) -> None:
    """Log the records that were skipped, then check that there are pairs and that one of the first images exists.

    Raises ValueError without pairs, FileNotFoundError without images.
    """
    assert isinstance(pairs, ImageFiles)
    assert pairs.records is not None
    pairs.records.log(f"{who}: {annotations}")
    names = [pairs.images[j] for j in range(min(FIRST, len(pairs.images)))]
    if not names:
        raise ValueError(f"{who}: {annotations} has no captions for this split")
    if not any(os.path.isfile(image_path(pairs.root, name)) for name in names):
        raise FileNotFoundError(
            f"{who}: the first {len(names)} images of {annotations} ({', '.join(names[:3])} ...) are not in "
            f"{pairs.root}; images must be the folder that these names are relative to"
        )
