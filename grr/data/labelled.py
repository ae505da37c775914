"""Images that belong to classes, alone or together with a text: what a classifier learns, in three public layouts."""

import hashlib
import itertools
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from grr.data.collate import IGNORE
from grr.data.formats.annotations import objects_in, read_annotations, value_of, with_images
from grr.data.formats.rows import read_lines, read_objects
from grr.data.images import SUFFIXES, THUMBNAIL, Crop
from grr.data.pairs import ImageFiles, Ints, Pairs, Row, Texts, read_rows
from grr.data.records import Records

JUDGEMENTS = ["entailment", "neutral", "contradiction"]
WHAT = "what is this"  # the text of an image that has none: one that gives no class away, should a model read it


class Labelled(Pairs):
    """Pairs that belong to classes: pictures to name, questions to answer, sentences to judge.

    classes: their names, in the order of a classifier's outputs. labels: [n], numbers of classes, or IGNORE for a pair
    that belongs to none of them: nothing is learned from it, and no answer to it is right.
    """

    def __init__(self, pairs: Pairs, classes: list[str], labels: Ints) -> None:
        super().__init__(pairs.ids, pairs.captions, pairs.image_of)
        self.pairs, self.classes, self.labels, self.records = pairs, classes, labels, pairs.records

    @cached_property
    def fingerprint(self) -> str:
        """A hash of ids, captions, classes and labels in their order; images are not read."""
        own = Texts.of(self.classes).digest() + self.labels.astype("<i8").tobytes()
        return hashlib.blake2b(self.pairs.fingerprint.encode() + own, digest_size=16).hexdigest()

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return self.pairs.load(i, size=size, crop=crop)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return self.pairs.thumbnail(i, side=side)


def refuse_other_classes(train: Labelled, held_out: Labelled) -> None:
    """Data to validate on have the classes of the training data, in their order: raises ValueError if they have not."""
    both = itertools.zip_longest(train.classes, held_out.classes)
    for number, (ours, theirs) in enumerate(both):
        if ours != theirs:
            raise ValueError(
                "refuse_other_classes: validation must have the classes of the training data, in their order, got "
                f"{len(held_out.classes)} classes instead of {len(train.classes)}, and of number {number} {theirs!r} "
                f"instead of {ours!r}; let validation.classes_from name the training data"
            )


def text_only_accuracy(train: Labelled, held_out: Labelled) -> float:
    """The accuracy of who never looks at an image: each text gets the class that it had most often in training.

    A text that did not occur there gets the class that is most frequent of all; of equally frequent ones, the first.
    """
    classes_of: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for text, label in zip(train.captions, train.labels.tolist(), strict=True):
        if label != IGNORE:
            classes_of[text][label] += 1
    answer_of = {text: _most_common(counts) for text, counts in classes_of.items()}
    otherwise = _most_common(sum(classes_of.values(), Counter()))
    right = [
        answer_of.get(text, otherwise) == label
        for text, label in zip(held_out.captions, held_out.labels.tolist(), strict=True)
    ]
    return sum(right) / len(right)


def image_folder(*, path: str, classes_from: str | None = None) -> Labelled:
    """A folder of images for each class, as ImageNet has it: path/n01440764/n01440764_18.JPEG.

    The classes are the folders, by name. `classes_from` gives those of other data instead, in their order: the path of
    these, or a file with a line for each class: its folder and, behind a blank, how it is called if that is another
    name (ImageNet's LOC_synset_mapping.txt). Raises FileNotFoundError if something is not there, ValueError if a
    folder is none of the classes.
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
    files = ((Row(file, WHAT, file), number[folder]) for folder in folders for file in _images(path, folder, records))
    labelled = _labelled(Path(path), files, list(class_of.values()), records)
    records.log(f"image_folder: {path}")
    if not len(labelled):
        raise FileNotFoundError(
            f"image_folder: there are no images in {path}; it must hold a folder of images for each class"
        )
    return labelled


def vqa_v2(
    *, questions: str, annotations: str, images: str, answers: int = 3129, classes_from: str | None = None
) -> Labelled:
    """Visual question answering as VQA v2 (Goyal et al. 2017) comes: v2_OpenEnded_mscoco_train2014_questions.json,
    v2_mscoco_train2014_annotations.json, and the folder of COCO's images, or the one that holds it (train2014/).

    A question's class is the answer that most of its annotators gave. The classes are the `answers` most frequent ones,
    and questions with others are left out. For validation, `classes_from` names the annotations of the training data:
    the classes are found there, and all questions are kept, those with other answers as answered wrongly. The official
    accuracy also gives credit for what fewer annotators said, so it is higher. Raises FileNotFoundError if something
    is not there, ValueError if a file is of another kind.
    """
    asked = read_annotations("vqa_v2", questions, images, ("questions", "data_subtype"))
    answered = read_annotations("vqa_v2", annotations, images, ("annotations",))
    counted = answered if classes_from is None else read_annotations("vqa_v2", classes_from, images, ("annotations",))
    counts = Counter(_answers(classes_from or annotations, counted).values())
    classes = sorted(counts, key=lambda answer: (-counts[answer], answer))[:answers]
    number = {answer: i for i, answer in enumerate(classes)}
    answer_of = _answers(annotations, answered)
    year = str(asked["data_subtype"])  # train2014
    folder = f"{year}/" if Path(images, year).is_dir() else ""
    records = Records()

    def rows() -> Iterator[tuple[Row, int]]:
        for j, question in enumerate(objects_in(f"vqa_v2: {questions}", asked, "questions")):
            where = f"vqa_v2: {questions} questions[{j}]"
            own, image = (value_of(question, key, (int,), where) for key in ("question_id", "image_id"))
            text = value_of(question, "question", (str,), where)
            if own not in answer_of:
                raise ValueError(
                    f"vqa_v2: {annotations} must hold an answer to each question of {questions}, but there is none for "
                    f"{own}; are the two of one split?"
                )
            label = number.get(answer_of.pop(own), IGNORE)
            if label == IGNORE and classes_from is None:
                records.leave_out("with a rare answer")
            else:
                yield Row(f"{folder}COCO_{year}_{image:012d}.jpg", text, where), label

    labelled = _labelled(Path(images), rows(), classes, records)
    for own in answer_of:
        records.skip(f"question_id {own}", "answer without a question")
    return _with_images("vqa_v2", annotations, labelled)


def snli_ve(*, path: str, images: str) -> Labelled:
    """Visual entailment as SNLI-VE (Xie et al. 2019) comes: snli_ve_train.jsonl and Flickr30k's folder of images.

    The image is the premise, sentence2 the hypothesis; where the annotators did not agree ("-"), it is left out.
    Raises FileNotFoundError if something is not there, ValueError if the file is of another kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"snli_ve: there is no file {path}")
    number = {judgement: i for i, judgement in enumerate(JUDGEMENTS)}
    records = Records()

    def rows() -> Iterator[tuple[Row, int]]:
        for i, row in read_objects("snli_ve", Path(path), read_lines("snli_ve", Path(path))):
            where = f"snli_ve: {path} line {i}"
            image, text, judgement = (row.get(key) for key in ("flickr30k_id", "sentence2", "gold_label"))
            if not isinstance(image, str) or not isinstance(text, str) or judgement not in {"-", *JUDGEMENTS}:
                raise ValueError(
                    f"{where} must be an object with Flickr30K_ID, sentence2 and gold_label "
                    f"({', '.join(JUDGEMENTS)} or -), got {str(row)[:80]!r}; mend the line"
                )
            if judgement == "-":
                records.leave_out("without a judgement")
            else:
                yield Row(f"{image}.jpg", text, where), number[judgement]

    return _with_images("snli_ve", path, _labelled(Path(images), rows(), list(JUDGEMENTS), records))


def _answers(file: str, content: dict[str, Any]) -> dict[int, str]:
    """The answer to each question in a file of VQA's annotations. Raises ValueError, naming the place."""
    answers: dict[int, str] = {}
    for j, annotation in enumerate(objects_in(f"vqa_v2: {file}", content, "annotations")):
        where = f"vqa_v2: {file} annotations[{j}]"
        own = value_of(annotation, "question_id", (int,), where)
        if own in answers:
            raise ValueError(f"{where} must answer a question of its own, got question_id {own} again; take one out")
        answers[own] = value_of(annotation, "multiple_choice_answer", (str,), where)
    return answers


def _most_common(counts: Counter[int]) -> int:
    return min(counts, key=lambda label: (-counts[label], label))


def _class_folders(path: str) -> dict[str, str]:
    """The folders of classes, in order, and how the classes are called."""
    if Path(path).is_dir():
        return {p.name: p.name for p in sorted(Path(path).iterdir()) if p.is_dir() and not p.name.startswith(".")}
    if not Path(path).is_file():
        raise FileNotFoundError(f"image_folder: there is no folder and no file of classes {path}")
    lines = (line.strip().partition(" ") for _, line in read_lines("image_folder", Path(path)))
    return {folder: name.strip() or folder for folder, _, name in lines if folder}


def _images(path: str, folder: str, records: Records) -> Iterator[str]:
    """The images of a class by name, at any depth, as paths below the folder of all classes."""
    seen = set[str]()
    for place, folders, files in os.walk(Path(path, folder), followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder that was read
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        below = Path(place).relative_to(path).as_posix()
        images = [file for file in sorted(files) if file.lower().endswith(SUFFIXES)]
        records.leave_out("not named as an image", len(files) - len(images))
        yield from (f"{below}/{file}" for file in images)


def _labelled(root: Path, rows: Iterable[tuple[Row, int]], classes: list[str], records: Records) -> Labelled:
    """Of rows and their labels."""
    labels = array("q")

    def walk() -> Iterator[Row]:
        for row, label in rows:
            labels.append(label)
            yield row

    pairs, row_of = read_rows(root, walk(), records)
    return Labelled(pairs, classes, np.array(labels, dtype=np.int64)[row_of])


def _with_images(who: str, file: str, labelled: Labelled) -> Labelled:
    assert isinstance(labelled.pairs, ImageFiles)
    with_images(who, file, labelled.pairs)
    return labelled
