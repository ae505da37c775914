"""What a validation or an evaluation shows of single samples: retrieved images, captions, answers."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Retrieval:
    """A sentence and the images nearest to it, best first; correct is the place of the right one, None if missed."""

    query: str
    images: list[Tensor]  # uint8 [3, h, w]
    scores: list[float]
    correct: int | None


@dataclass
class Caption:
    """An image, the caption written for it, and those that people wrote."""

    image: Tensor  # uint8 [3, h, w]
    written: str
    references: list[str]


@dataclass
class Answer:
    """An image, what was asked or said of it, the class it was given, and the right one; None if it has none."""

    image: Tensor  # uint8 [3, h, w]
    text: str
    given: str
    right: str | None


@dataclass
class Examples:
    retrievals: list[Retrieval]
    captions: list[Caption]
    answers: list[Answer] = field(default_factory=list)
