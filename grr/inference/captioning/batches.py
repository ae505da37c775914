"""Captions of a stream of images, in batches: written, scored, and left out where a score is too low."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from grr.data.image_files import batches, read_batches
from grr.evaluation.outputs import TEXTS, text_outputs
from grr.generation.generate import generate_several
from grr.inference.captioner import Captioner
from grr.inference.results import Row
from grr.models.coca import evaluating
from grr.seeds import derive_seed

DIGITS = 4  # of scores in rows

T = TypeVar("T", bound=Hashable)


@dataclass
class CaptionOptions:
    """How many captions an image gets, and which are left out."""

    num_captions: int = 1  # captions of an image, by sampling or by beams
    scores: bool = False  # write the scores of each caption: its likelihood, and its cosine similarity to the image
    min_likelihood: float | None = None  # leave out captions whose mean log-probability per token is lower
    min_cosine: float | None = None  # leave out captions whose cosine similarity to their image is lower

    @property
    def scored(self) -> bool:
        """Whether scores are computed."""
        return self.scores or self.min_likelihood is not None or self.min_cosine is not None

    def changed(self) -> dict[str, Any]:
        """Returns the options that differ from the defaults."""
        return {name: value for name, value in vars(self).items() if value != getattr(CaptionOptions, name)}


class Caption(NamedTuple):
    """Caption of an image. Scores are None if they were not computed."""

    text: str
    likelihood: float | None = None  # mean log-probability per token, EOS included, of the text given the image
    cosine: float | None = None  # of the embeddings of text and image


def caption_batches(
    trained: Captioner,
    of: Iterable[list[T]],
    read: Callable[[T], Tensor],
    name: Callable[[T], str],
    generation: dict[str, Any] | None = None,
    options: CaptionOptions | None = None,
) -> Iterator[list[tuple[T, Row]]]:
    """Caption the images of each batch of items; yield the items of a batch with their rows, which `image_row` makes.

    read: the image of an item, uint8 [3, h, w]; it runs in threads, for the next batch while the model writes the
    captions of this one. name: of the item, in its row; what is sampled for an image depends on its name and the seed,
    and not on its batch. generation: options of `generate`.
    """
    generation, options = generation or {}, options or CaptionOptions()
    for good, pixels, bad in read_batches(read, of):
        names = [name(item) for item in good]
        captions = [] if pixels is None else write_captions(trained, pixels, names, generation, options)
        rows: list[tuple[T, Row]] = [
            (item, image_row(file, some, options)) for item, file, some in zip(good, names, captions, strict=True)
        ]
        yield rows + [(item, {"file": name(item), "error": why}) for item, why in bad.items()]


@torch.no_grad()
def write_captions(
    trained: Captioner, pixels: Tensor, names: list[str], generation: dict[str, Any], options: CaptionOptions
) -> list[list[Caption]]:
    """Write the captions of images, uint8 [b, 3, h, w], each image encoded once: b lists, without empty captions."""
    model, tokenizer, pixels = trained.model, trained.tokenizer, pixels.to(trained.device)
    seed = generation.get("seed", 0)
    keys = torch.tensor([derive_seed(seed, name) for name in names]).to(pixels.device)  # [b]
    texts, context = generate_several(
        model, pixels, tokenizer, generation, num_captions=options.num_captions, keys=keys
    )
    texts = [[text for text in some if text.strip()] for some in texts]  # readers skip a caption of white space
    if not options.scored:
        return [[Caption(text) for text in some] for some in texts]
    captions: list[list[Caption]] = [[] for _ in texts]
    with evaluating(model):
        for some in batches([(row, text) for row, of_image in enumerate(texts) for text in of_image], TEXTS):
            rows = [row for row, _ in some]
            outputs = text_outputs(model, [text for _, text in some], tokenizer, context[rows])
            likelihoods = -outputs.token_losses / outputs.tokens  # [m]
            cosines = (outputs.image_embeddings * outputs.text_embeddings).sum(1)  # [m]
            for (row, text), p, cosine in zip(some, likelihoods.tolist(), cosines.tolist(), strict=True):
                captions[row].append(Caption(text, round(p, DIGITS), round(cosine, DIGITS)))
    return captions


def image_row(file: str, captions: list[Caption], options: CaptionOptions) -> Row:
    """Returns the row of an image: {"file", "caption"}, with "likelihood" and "cosine" if there are scores.

    With num_captions > 1 the three are lists. Captions that are left out are in the list "rejected". If all are, the
    row has no caption, but "filtered", the reason why the first was left out, and its scores. Without a caption,
    because all were empty, "filtered" is "empty caption".
    """
    reasons = [_reason(caption, options) for caption in captions]
    kept = [caption for caption, reason in zip(captions, reasons, strict=True) if not reason]
    row: Row = {"file": file}
    shown = kept or captions[:1]
    if not kept:
        row["filtered"] = reasons[0] if captions else "empty caption"
    else:
        row["caption"] = [caption.text for caption in kept]
    if options.scored and shown:
        row |= {"likelihood": [c.likelihood for c in shown], "cosine": [c.cosine for c in shown]}
    if options.num_captions == 1 or not kept:
        row |= {key: row[key][0] for key in ("caption", "likelihood", "cosine") if key in row}
    rejected = [caption.text for caption, reason in zip(captions, reasons, strict=True) if reason]
    return row | ({"rejected": rejected} if rejected else {})


def _reason(caption: Caption, options: CaptionOptions) -> str:
    """Returns why a caption is left out; empty if it is not."""
    for name, score, least in (
        ("likelihood", caption.likelihood, options.min_likelihood),
        ("cosine", caption.cosine, options.min_cosine),
    ):
        if least is not None and not (score is not None and score >= least):  # NaN is not
            return f"{name} below {least:g}"
    return ""
