"""Tests of composition: questions that compare images with a right and a wrong caption.

SugarCrepe, ARO and Winoground, each in the layout in which it is distributed.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grr.data.formats.annotations import MAX_BYTES, check_images_exist, value_of
from grr.data.formats.rows import read_lines, read_objects
from grr.data.images import THUMBNAIL, Crop, cut_file
from grr.data.pairs import ImageFiles, Ints, Pairs, Texts
from grr.data.records import Records, record_captions
from grr.files.regular import read_regular_file

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


SUGARCREPE = {f"{kind}.json" for kind in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel")}
SUGARCREPE |= {"swap_att.json", "swap_obj.json"}

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A caption that a question compares with others for an image."""

    question: int
    kind: str  # of question
    image: str  # path relative to the folder of images
    caption: str
    right: bool
    box: Box | None = None  # the part of the image that is shown; None: all


class Choices(Pairs):
    """Pairs that questions consist of: a question compares each of its images with captions, right and wrong ones.

    questions: [n], the number of the question of each pair. right: bool [n]. kinds: names of kinds of questions.
    kind: [n], the number of the kind of each pair.
    """

    def __init__(self, pairs: Pairs, questions: Ints, right: NDArray[np.bool_], kinds: list[str], kind: Ints) -> None:
        super().__init__(pairs.ids, pairs.captions, pairs.image_of)
        self.pairs, self.records = pairs, pairs.records
        self.questions, self.right, self.kinds, self.kind = questions, right, kinds, kind

    @cached_property
    def fingerprint(self) -> str:
        """A hash of ids, captions, questions and answers in their order; images are not read."""
        own = self.questions.astype("<i8").tobytes() + self.right.tobytes() + self.kind.astype("<i8").tobytes()
        digest = self.pairs.fingerprint.encode() + Texts.of(self.kinds).digest() + own
        return hashlib.blake2b(digest, digest_size=16).hexdigest()

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return self.pairs.load(i, size=size, crop=crop)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return self.pairs.thumbnail(i, side=side)


def sugarcrepe(*, path: str, images: str) -> Choices:
    """Read SugarCrepe (Hsieh et al. 2023): path is its folder of add_att.json ... swap_obj.json or one of these files,
    images the folder of COCO's val2017.

    A question is an image with a right and a wrong caption; its kind is the name of its file. Files of other names in
    the folder are not read, and a warning names them. Raises FileNotFoundError
    if there is no file or no image; ValueError, naming the entry, if a file has another content.
    """
    found = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else []
    files = [file for file in found if file.name in SUGARCREPE] if Path(path).is_dir() else [Path(path)]
    if others := [file.name for file in found if file.name not in SUGARCREPE]:
        logger.warning("sugarcrepe: files of other names in %s are not read: %s", path, ", ".join(others))
    if not files:
        raise FileNotFoundError(f"sugarcrepe: path must be the folder of add_att.json and others, got {path}")

    def choices() -> Iterator[Choice]:
        number = 0
        for file in files:
            for key, entry in _entries("sugarcrepe", file):
                where = f"sugarcrepe: {file} [{key}]"
                image, right, wrong = (
                    value_of(entry, name, (str,), where) for name in ("filename", "caption", "negative_caption")
                )
                yield Choice(number, file.stem, image, right, True)
                yield Choice(number, file.stem, image, wrong, False)
                number += 1

    return _read("sugarcrepe", path, Path(images), choices())


def aro(*, path: str, images: str) -> Choices:
    """Read Visual Genome Relation or Attribution of ARO (Yuksekgonul et al. 2023): path is its
    visual_genome_relation.json or visual_genome_attribution.json, images the folder of the images.

    A question is a box of an image with a right and a wrong caption; its kind is the relation, or the two attributes.
    Raises as `sugarcrepe` does.
    """

    def choices() -> Iterator[Choice]:
        for number, (key, entry) in enumerate(_entries("aro", Path(path))):
            where = f"aro: {path} [{key}]"
            image, right, wrong = (
                value_of(entry, name, (str,), where) for name in ("image_path", "true_caption", "false_caption")
            )
            left, top, width, height = (value_of(entry, f"bbox_{name}", (int,), where) for name in "xywh")
            if "attributes" in entry:
                kind = ", ".join(map(str, value_of(entry, "attributes", (list,), where)))
            else:
                kind = value_of(entry, "relation_name", (str,), where)
            box = left, top, left + width, top + height
            yield Choice(number, kind, image, right, True, box)
            yield Choice(number, kind, image, wrong, False, box)

    return _read("aro", path, Path(images), choices())


def winoground(*, path: str) -> Choices:
    """Read Winoground (Thrush et al. 2022): path is its folder, with examples.jsonl and images/ in it.

    A question has two images and two captions, of which each belongs to one; its kind is the collapsed tag of the file.
    Raises as `sugarcrepe` does.
    """
    file = Path(path) / "examples.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"winoground: path must be the folder of examples.jsonl and images/, got {path}")

    def choices() -> Iterator[Choice]:
        for line, entry in read_objects("winoground", file, read_lines("winoground", file)):
            where = f"winoground: {file} line {line}"
            pictures = [value_of(entry, f"image_{i}", (str,), where) for i in (0, 1)]
            captions = [value_of(entry, f"caption_{i}", (str,), where) for i in (0, 1)]
            if pictures[0] == pictures[1] or captions[0] == captions[1]:
                raise ValueError(f"{where} must have two images and two captions, got one twice; correct the line")
            for i, picture in enumerate(pictures):
                name = picture if Path(picture).suffix else f"{picture}.png"
                for j, caption in enumerate(captions):
                    yield Choice(line, str(entry.get("collapsed_tag", "")), name, caption, i == j)

    return _read("winoground", path, file.parent / "images", choices())


class Parts(ImageFiles):
    """Pairs whose images are parts of files: image j is what boxes[j] shows of its file, all of it if it is None."""

    def __init__(
        self, root: Path, images: Sequence[tuple[str, Box | None]], captions: list[str], image_of: Ints
    ) -> None:
        names = [name + ("" if box is None else f"[{','.join(map(str, box))}]") for name, box in images]
        ids = Texts.of(f"{names[j]}#{i}" for i, j in enumerate(image_of.tolist()))
        super().__init__(root, Texts.of(name for name, _ in images), ids, Texts.of(captions), image_of)
        self.boxes = [box for _, box in images]

    def content(self, i: int) -> bytes:
        """Returns the bytes of an image file: of a part, a PNG. Raises OSError, and BadImage for a part."""
        content, box = super().content(i), self.boxes[self.image_of[i]]
        return content if box is None else cut_file(content, box)


def _entries(who: str, file: Path) -> Iterable[tuple[object, dict[str, Any]]]:
    """Returns the entries of a JSON file, an object or a list of objects, with their keys or numbers."""
    if not file.is_file():
        raise FileNotFoundError(f"{who}: there is no file {file}")
    try:
        content = json.loads(read_regular_file(file, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{who}: {file} is not JSON ({error}); unpack or download it again") from error
    if not isinstance(content, dict | list):
        raise ValueError(f"{who}: {file} must hold an object or a list, got {str(content)[:80]!r}; is it another file?")
    return content.items() if isinstance(content, dict) else enumerate(content)


def _read(who: str, path: str, root: Path, choices: Iterable[Choice]) -> Choices:
    """Collect choices as pairs whose images are encoded once. Raises as `check_images_exist` does."""
    images: dict[tuple[str, Box | None], int] = {}
    kinds: dict[str, int] = {}
    captions, image_of, questions, right, kind = [], [], [], [], []
    for choice in choices:
        captions.append(record_captions(choice.caption, f"{who}: question {choice.question}")[0])
        image_of.append(images.setdefault((choice.image, choice.box), len(images)))
        questions.append(choice.question)
        right.append(choice.right)
        kind.append(kinds.setdefault(choice.kind, len(kinds)))
    pairs = Parts(root, list(images), captions, np.array(image_of, dtype=np.int64))
    pairs.records = Records()
    pairs.records.read = len(pairs)
    check_images_exist(who, path, pairs)
    return Choices(pairs, np.array(questions), np.array(right, dtype=bool), list(kinds), np.array(kind))
