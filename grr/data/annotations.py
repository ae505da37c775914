"""Captions in one JSON file: COCO's own layout, and Karpathy's splits of Flickr30k and COCO."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grr.data.pairs import ImageFiles, Pairs, image_files, split_name


def coco(*, annotations: str, images: str) -> Pairs:
    """COCO captions: annotations is a captions_*.json, images the folder of its files (train2017/, say).

    Raises FileNotFoundError if something is not there, ValueError if the file is of another kind.
    """
    content = read_annotations("coco", annotations, images, ("images", "annotations"))
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [(names[a["image_id"]], a["caption"]) for a in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"coco: {annotations} must be a file of captions, each of an image that it lists, but lacks {error}; "
            "instances and keypoints have other files"
        ) from error
    return with_images("coco", annotations, image_files(Path(images), rows))


def karpathy(*, annotations: str, images: str, split: str) -> Pairs:
    """Karpathy and Fei-Fei's splits (2015): annotations is dataset_flickr30k.json, dataset_flickr8k.json or
    dataset_coco.json, images the folder of the files, for COCO the one that holds train2014/ and val2014/.

    split is train, validation or test; COCO's restval belongs to train.
    Raises FileNotFoundError if something is not there, ValueError if the file is of another kind.
    """
    content = read_annotations("karpathy", annotations, images, ("images",))
    wanted = split_name("karpathy", split)

    def rows() -> Iterator[tuple[str, object]]:
        for image in content["images"]:
            if split_name(f"karpathy: {annotations}", image["split"]) == wanted:
                name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
                yield from ((name, sentence["raw"]) for sentence in image["sentences"])

    try:
        pairs = image_files(Path(images), rows())
    except (KeyError, TypeError) as error:
        raise ValueError(f"karpathy: {annotations} must be in Karpathy's layout, but an image lacks {error}") from error
    return with_images("karpathy", annotations, pairs)


def read_annotations(who: str, annotations: str, images: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The object in a JSON file that must hold these keys. Raises as the formats do."""
    if not Path(annotations).is_file():
        raise FileNotFoundError(f"{who}: there is no file of annotations {annotations}")
    if not Path(images).is_dir():
        raise FileNotFoundError(f"{who}: there is no folder of images {images}")
    try:
        content = json.loads(Path(annotations).read_bytes())
    except ValueError as error:
        raise ValueError(f"{who}: {annotations} is not JSON ({error}); was it unpacked whole?") from error
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise ValueError(f"{who}: {annotations} must hold an object with {' and '.join(keys)}; is it another file?")
    return content


def with_images(who: str, annotations: str, pairs: ImageFiles) -> ImageFiles:
    """The pairs, if there are any and if one of their first images is there. Raises as the formats do."""
    names = [pairs.images[j] for j in range(min(100, len(pairs.images)))]
    if not names:
        raise ValueError(f"{who}: {annotations} holds nothing for this split")
    if not any((pairs.root / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{who}: the first {len(names)} images of {annotations} ({', '.join(names[:3])} ...) are not in "
            f"{pairs.root}; images must be the folder that these names start from"
        )
    return pairs
