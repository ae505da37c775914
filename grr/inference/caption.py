"""Captioning of image files with a trained model."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grr.data.image_files import read_images
from grr.generation.generate import check_generation, generate
from grr.inference.captioner import Captioner
from grr.inference.pretrained import fingerprint
from grr.inference.results import Outcome, Row, write_results

BATCH = 50  # images at a time


def caption_files(
    trained: Captioner,
    files: Sequence[str],
    output: Path,
    generation: dict[str, Any] | None = None,
    *,
    batch_size: int = BATCH,
    progress: bool = False,
) -> Outcome:
    """Caption image files, and append a JSON line {"file", "caption"} or {"file", "error"} per file to output.

    generation: options of `generate`. Files that already have a caption in output are skipped, so a run that was killed
    can be continued. An unreadable file does not end the run. Raises ValueError if output was written with another
    model or other options.
    """
    check_generation("caption_files", generation or {})
    made_with = {"model": fingerprint(trained), "generation": generation or {}}

    def work(left: list[str]) -> Iterator[list[Row]]:
        return caption_images(trained, left, generation, batch_size=batch_size)

    return write_results(output, files, made_with, work, progress="captions" if progress else None)


def caption_images(
    trained: Captioner, files: Iterable[str], generation: dict[str, Any] | None = None, *, batch_size: int = BATCH
) -> Iterator[list[Row]]:
    """Caption image files; yield the rows of a batch: {"file", "caption"}, then {"file", "error"} of bad files."""
    check_generation("caption_images", generation or {})
    model, tokenizer, image_size, crop = trained
    device = next(model.parameters()).device
    for good, pixels, bad in read_images(files, image_size=image_size, crop=crop, batch_size=batch_size):
        captions = [] if pixels is None else generate(model, pixels.to(device), tokenizer, **generation or {})
        rows: list[Row] = [{"file": file, "caption": text} for file, text in zip(good, captions, strict=True)]
        yield rows + [{"file": file, "error": why} for file, why in bad.items()]
