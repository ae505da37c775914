"""Captions of image files, a JSON line each."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from grr.data.image_files import batches
from grr.data.images import load_image
from grr.generation.generate import check_generation, check_options
from grr.inference.captioner import Captioner
from grr.inference.captioning.batches import CaptionOptions, caption_batches
from grr.inference.pretrained import fingerprint
from grr.inference.results import Outcome, Row, write_results

BATCH = 50  # images at a time


def caption_files(
    trained: Captioner,
    files: Sequence[str],
    output: Path,
    generation: dict[str, Any] | None = None,
    *,
    options: CaptionOptions | None = None,
    batch_size: int = BATCH,
    progress: bool = False,
) -> Outcome:
    """Caption image files, and append a JSON line per file to output: that of `image_row`, or {"file", "error"}.

    generation: options of `generate`. Called by all processes of a group alike, each of which captions a part of the
    files. Files that already have a line without an error in output are skipped, so a run that was killed can be
    continued. An unreadable file does not end the run. Raises ValueError if output was written with another model or
    other options.
    """
    check_generation("caption_files", generation or {})
    several = (options or CaptionOptions()).num_captions
    check_options(trained.model, trained.tokenizer, generation or {}, num_captions=several)
    made_with = captions_made_with(trained, generation, options)

    def work(left: list[str]) -> Iterator[list[Row]]:
        return caption_images(trained, left, generation, options=options, batch_size=batch_size)

    return write_results(output, files, made_with, work, progress="captions" if progress else None)


def caption_images(
    trained: Captioner,
    files: Iterable[str],
    generation: dict[str, Any] | None = None,
    *,
    options: CaptionOptions | None = None,
    batch_size: int = BATCH,
) -> Iterator[list[Row]]:
    """Caption image files; yield the rows of a batch: those of `image_row`, then {"file", "error"} of bad files."""
    check_generation("caption_images", generation or {})
    read = partial(load_image, size=trained.image_size, crop=trained.crop)
    of = batches(list(files), batch_size)
    for rows in caption_batches(trained, of, read, str, generation, options):
        yield [row for _, row in rows]


def captions_made_with(
    trained: Captioner, generation: dict[str, Any] | None, options: CaptionOptions | None
) -> dict[str, Any]:
    """Returns what captions depend on beside their images, as JSON values."""
    changed = (options or CaptionOptions()).changed()
    return {"model": fingerprint(trained), "generation": generation or {}} | changed
