"""Zero-shot classification of image files with a trained model."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from grr.data.image_files import read_images
from grr.evaluation.zero_shot import TEMPLATES, class_embeddings, class_probabilities
from grr.inference.captioner import Captioner
from grr.inference.pretrained import fingerprint
from grr.inference.results import Outcome, Row, write_results

BATCH = 50  # images at a time


def classify_files(
    trained: Captioner,
    files: Sequence[str],
    classes: Sequence[str],
    output: Path,
    *,
    templates: tuple[str, ...] = TEMPLATES,
    top: int = 5,
    batch_size: int = BATCH,
    progress: bool = False,
) -> Outcome:
    """Classify image files, and append a JSON line per file to output, with the rows of `classify_images`.

    Files that already have classes in output are skipped, so a run that was killed can be continued. An unreadable file
    does not end the run. Raises ValueError if output was written with another model or other classes.
    """
    made_with = {"model": fingerprint(trained), "classes": list(classes), "templates": list(templates), "top": top}

    def work(left: list[str]) -> Iterator[list[Row]]:
        return classify_images(trained, left, classes, templates=templates, top=top, batch_size=batch_size)

    return write_results(output, files, made_with, work, progress="classes" if progress else None)


@torch.no_grad()
def classify_images(
    trained: Captioner,
    files: Iterable[str],
    classes: Sequence[str],
    *,
    templates: tuple[str, ...] = TEMPLATES,
    top: int = 5,
    batch_size: int = BATCH,
) -> Iterator[list[Row]]:
    """Classify image files; yield a batch of rows at a time.

    A row is {"file", "classes", "probabilities"} with the `top` most probable classes, best first, or {"file", "error"}
    of a bad file, after the others. Probabilities are softmax(cosine similarities / temperature of the model) over all
    classes; classes of equal probability keep the order of `classes`. Raises ValueError as `class_embeddings` does, if
    top < 1, and if the model computes NaN or infinity.
    """
    if top < 1:
        raise ValueError(f"classify_images: top must be at least 1, got {top=}")
    model, tokenizer, image_size, crop = trained
    device = next(model.parameters()).device
    names = class_embeddings(model, tokenizer, classes, device, templates=templates)  # [c, e]
    for good, pixels, bad in read_images(files, image_size=image_size, crop=crop, batch_size=batch_size):
        rows: list[Row] = []
        if pixels is not None:
            probabilities = class_probabilities(model, pixels.to(device), names, who="classify_images", of=good)
            p, order = probabilities.sort(dim=1, descending=True, stable=True)  # [b, c]
            for file, ids, best in zip(good, order[:, :top].tolist(), p[:, :top].tolist(), strict=True):
                rows.append({"file": file, "classes": [classes[i] for i in ids], "probabilities": best})
        yield rows + [{"file": file, "error": why} for file, why in bad.items()]


def split_classes(text: str) -> list[str]:
    """Returns the class names of a comma-separated text; a name that contains a comma needs double quotes.

    Raises ValueError if a quote is not closed.
    """
    try:
        names = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error:
        raise ValueError(f"split_classes: a double quote must be closed after its name, got {text!r}") from None
    return [name for part in names if (name := " ".join(part.split()))]


def read_classes(file: str | Path) -> list[str]:
    """Returns the class names in a text file, one per line; empty lines are ignored.

    Raises FileNotFoundError if the file does not exist, ValueError if it is not UTF-8 text.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"read_classes: {file} is not UTF-8 text ({error}); save it as UTF-8") from error
    except FileNotFoundError:
        raise FileNotFoundError(f"read_classes: the file of classes {file} does not exist; check the path") from None
    return [name for line in text.split("\n") if (name := " ".join(line.split()))]
