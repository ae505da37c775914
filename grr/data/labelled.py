"""Pairs with classes, the data of a classifier."""

import hashlib
import itertools
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from grr.data.collate import IGNORE
from grr.data.images import THUMBNAIL, Crop
from grr.data.pairs import Ints, Pairs, Row, Texts, read_rows
from grr.data.records import Records

JUDGEMENTS = ["entailment", "neutral", "contradiction"]
CLASS_TEXT = "what is this"  # the text of an image without one; it does not depend on the class


class Labelled(Pairs):
    """Pairs that belong to classes: images of objects, questions with answers, sentences with judgements.

    classes: their names, in the order of a classifier's outputs. labels: [n], numbers of classes, or IGNORE for a pair
    that belongs to none of them: it does not contribute to the loss, and every answer to it counts as an error.
    people: [n], the answers that people gave to each question, one a line; None for data without.
    """

    def __init__(self, pairs: Pairs, classes: list[str], labels: Ints, people: Texts | None = None) -> None:
        super().__init__(pairs.ids, pairs.captions, pairs.image_of)
        self.pairs, self.classes, self.labels, self.records = pairs, classes, labels, pairs.records
        self.people = people

    @cached_property
    def fingerprint(self) -> str:
        """A hash of ids, captions, classes and labels in their order; images are not read."""
        own = Texts.of(self.classes).digest() + self.labels.astype("<i8").tobytes()
        return hashlib.blake2b(self.pairs.fingerprint.encode() + own, digest_size=16).hexdigest()

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return self.pairs.load(i, size=size, crop=crop)

    def for_epoch(self, seed: int, epoch: int) -> "Labelled":
        pairs = self.pairs.for_epoch(seed, epoch)
        return self if pairs is self.pairs else Labelled(pairs, self.classes, self.labels, self.people)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return self.pairs.thumbnail(i, side=side)


class LabelledRow(NamedTuple):
    """Record of a file with its label."""

    row: Row
    label: int
    people: str | None = None  # the answers that people gave, one a line


def labelled_rows(root: Path, rows: Iterable[LabelledRow], classes: list[str], records: Records) -> Labelled:
    """Returns the pairs of some rows, each with a label; see `read_rows`."""
    labels = array("q")
    people: list[str] = []

    def without_labels() -> Iterator[Row]:
        for labelled in rows:
            labels.append(labelled.label)
            if labelled.people is not None:
                people.append(labelled.people)
            yield labelled.row

    pairs, row_of = read_rows(root, without_labels(), records)
    answered = Texts.of(people[i] for i in row_of) if people else None
    return Labelled(pairs, classes, np.array(labels, dtype=np.int64)[row_of], answered)


def check_classes(train: Labelled, held_out: Labelled) -> None:
    """Raise ValueError unless validation data have the classes of the training data, in their order."""
    for number, (ours, theirs) in enumerate(itertools.zip_longest(train.classes, held_out.classes)):
        if ours != theirs:
            raise ValueError(
                "check_classes: validation must have the classes of the training data, in their order, got "
                f"{len(held_out.classes)} classes instead of {len(train.classes)}, and class {number} is {theirs!r} "
                f"instead of {ours!r}; set validation.classes_from to the training data"
            )


def text_only_accuracy(train: Labelled, held_out: Labelled) -> float:
    """Returns the accuracy of the text-only baseline: each text is assigned its most frequent class in training.

    A text that does not occur in training is assigned the class that is most frequent overall; ties go to the class of
    lowest number.
    """
    counts_of: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for text, label in zip(train.captions, train.labels.tolist(), strict=True):
        if label != IGNORE:
            counts_of[text][label] += 1
    answer_of = {text: _most_common(counts) for text, counts in counts_of.items()}
    default = _most_common(sum(counts_of.values(), Counter()))
    labels = held_out.labels.tolist()
    right = [answer_of.get(text, default) == label for text, label in zip(held_out.captions, labels, strict=True)]
    return sum(right) / len(right)


def _most_common(counts: Counter[int]) -> int:
    return min(counts, key=lambda label: (-counts[label], label))
