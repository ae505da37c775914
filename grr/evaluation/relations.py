"""Spatial relations in captions: whether a caption says where the objects are."""

import re
from collections.abc import Iterable, Sequence

WHERE = re.compile(r"\babove\b|\bto the left of\b|\bat the (?:top|bottom) (?:left|right)\b")


def check_spatial(captions: Iterable[str]) -> None:
    """Raise ValueError if no caption has spatial words, before anything is computed for the task relations."""
    if not any(map(WHERE.search, captions)):
        raise ValueError(
            "relations: a caption of the data must have spatial words (above, to the left of, at the top left ...), "
            "got none; remove relations from run.tasks"
        )


def relation_accuracy(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> dict[str, float]:
    """Returns the fraction of captions with the spatial words of a reference, in its order, as `accuracy`.

    references[i] are the captions of image i, hypotheses[i] is the caption to score. The words are those of the
    built-in sentences: "above", "to the left of", and "at the top left" and the three other corners. Images whose
    references have none do not count; `images` is the number of the others. Objects and colours may be wrong: with the
    words "above" and "to the left of", a guess is right in half of the images. Raises as `check_spatial` does.
    """
    check_spatial(caption for captions in references for caption in captions)
    spoken = [[words for caption in captions if (words := WHERE.findall(caption))] for captions in references]
    right = [WHERE.findall(h) in some for h, some in zip(hypotheses, spoken, strict=True) if some]
    return {"accuracy": sum(right) / len(right), "images": len(right)}
