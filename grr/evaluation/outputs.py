"""Outputs of a model on images and their captions: embeddings, token losses, generated captions.

Images are read in fixed batches, each by one process, and the results are joined in the order of the data. So the
numbers are bit for bit the same for any number of processes with an equal number of threads: with another number of
threads torch sums in another order, and torchrun sets OMP_NUM_THREADS=1 unless it is set.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from grr.data import Labelled, Pairs
from grr.data.collate import IGNORE, collate_captions
from grr.data.image_files import batches, read_batches
from grr.data.images import Crop
from grr.data.records import Records
from grr.generation.generate import generate
from grr.models.coca import CoCa, encode_pixels, evaluating
from grr.tokenizers import Tokenizer

R = TypeVar("R")
BATCH = 50  # images at a time
TEXTS = 200  # of their captions at a time


@dataclass
class ModelOutputs:
    """Outputs of a model on n images and their m captions, in the order of the data."""

    pairs: Pairs
    image_size: int
    crop: Crop
    images: list[int]  # [n], the first pair of each image
    texts: list[int]  # [m], the pairs of these images
    image_of_text: Tensor  # int64 [m], the row of each caption's image
    image_embeddings: Tensor  # float32 [n, e]
    text_embeddings: Tensor  # float32 [m, e]
    token_losses: Tensor  # float64 [m], the sum over the tokens of each caption
    tokens: Tensor  # int64 [m], the number of tokens of each caption
    scale: float  # 1 / temperature
    bias: float
    truncated: Tensor  # bool [m], whether a caption has more tokens than max_tokens
    max_tokens: int  # of a caption, BOS, EOS and CLS not included
    written: list[str]  # [n] generated captions; empty without generation
    left_out: dict[str, str]  # name of an unreadable image or empty caption -> cause

    @cached_property
    def references(self) -> list[list[str]]:
        """Reference captions of each image: [n]."""
        result: list[list[str]] = [[] for _ in self.images]
        for t, i in zip(self.texts, self.image_of_text.tolist(), strict=True):
            result[i].append(self.pairs.captions[t])
        return result

    def facts(self) -> dict[str, Any]:
        """Returns the facts about the data for evaluation.json."""
        return {
            "fingerprint": self.pairs.fingerprint,
            "images": len(self.images),
            "captions": len(self.texts),
            "truncated": int(self.truncated.sum()),
            "max_tokens": self.max_tokens,
            **_left_out_facts(self.left_out),
            **_skipped_facts(self.pairs.records),
        }

    def thumbnail(self, i: int) -> Tensor:
        """Image i for a page: uint8 [3, h, w]."""
        return self.pairs.thumbnail(self.images[i])


@dataclass
class Features:
    """Features of n labelled images by a frozen model, in the order of the data."""

    labelled: Labelled
    embeddings: Tensor  # float32 [n, e], unit length: the output of the contrastive pooler
    patches: Tensor  # [n, p, d], input of the poolers, in the precision of the model; empty unless requested
    labels: Tensor  # int64 [n]
    left_out: dict[str, str]  # name of an unreadable image -> cause

    def facts(self) -> dict[str, Any]:
        """Returns the facts about the data for evaluation.json."""
        return {
            "fingerprint": self.labelled.fingerprint,
            "images": len(self.labels),
            **_left_out_facts(self.left_out),
            **_skipped_facts(self.labelled.records),
        }


class TextOutputs(NamedTuple):
    """Outputs of a model on m captions and their images."""

    image_embeddings: Tensor  # float32 [m, e]
    text_embeddings: Tensor  # float32 [m, e]
    token_losses: Tensor  # float64 [m], the sum over the tokens of each caption, EOS included
    tokens: Tensor  # int64 [m], their number
    truncated: Tensor  # bool [m], whether a caption has more tokens than the context
    scale: float  # 1 / temperature
    bias: float


@torch.no_grad()
def text_outputs(model: CoCa, texts: Sequence[str], tokenizer: Tokenizer, context: Tensor) -> TextOutputs:
    """Compute the outputs of m captions with the `image_context` of their images, [m, n, d]. They are on the CPU."""
    collated = collate_captions([tokenizer.encode(text) for text in texts], pad_id=tokenizer.pad_id)
    given = {name: x.to(context.device) for name, x in collated._asdict().items() if isinstance(x, Tensor)}
    output = model.from_context(context, given.pop("ids"), **given)
    assert output.token_losses is not None
    rows_of_labels = collated.label_places[: collated.num_labels] // collated.ids.shape[1]
    tokens = rows_of_labels.bincount(minlength=len(texts))  # [m]
    losses = output.token_losses[: collated.num_labels].cpu().double()
    return TextOutputs(
        output.image_embeddings.cpu(),
        output.text_embeddings.cpu(),
        torch.stack([x.sum() for x in losses.split(tokens.tolist())]),
        tokens,
        torch.tensor([tokenizer.truncates(text) for text in texts]),
        output.scale.item(),
        output.bias.item(),
    )


@torch.no_grad()
def compute_outputs(
    model: CoCa,
    pairs: Pairs,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    image_size: int,
    crop: Crop,
    images: int | None = None,
    generation: dict[str, Any] | None = None,
    progress: bool = False,
) -> ModelOutputs | None:
    """Compute embeddings and token losses of pairs, and captions if `generation` holds options of `generate`.

    images: use the first so many images; None: all. All processes call it with the whole model; rank 0 gets the result,
    the others None. An image is encoded once for all its captions. Unreadable images and empty captions are left out
    and named. Raises ValueError if no pair remains.
    """
    texts_of, left_out = _texts_of_images(pairs, images)

    def work(pixels: Tensor, members: list[int]) -> _Part:
        context = model.image_context(pixels)  # [b, n, d]
        members_texts = [(row, t) for row, i in enumerate(members) for t in texts_of[i]]
        texts = []
        for some in batches(members_texts, TEXTS):
            captions = [pairs.captions[t] for _, t in some]
            outputs = text_outputs(model, captions, tokenizer, context[[row for row, _ in some]])
            texts.append(([t for _, t in some], outputs))
        image_embeddings: dict[int, Tensor] = {}
        for (row, _), e in zip(members_texts, (e for _, part in texts for e in part.image_embeddings), strict=True):
            image_embeddings.setdefault(row, e)
        written = [] if generation is None else generate(model, pixels, tokenizer, **generation)
        return _Part(members, torch.stack([image_embeddings[row] for row in range(len(members))]), texts, written)

    with evaluating(model):
        parts, unread = over_images(
            pairs,
            list(texts_of),
            work,
            device,
            image_size=image_size,
            crop=crop,
            progress="pairs" if progress else None,
        )
    if dist.get_rank() > 0:
        return None
    left_out |= unread
    if not parts:
        raise ValueError(
            f"compute_outputs: one image with a caption must be readable, got none: {_some(left_out)}; check the data"
        )

    max_tokens = tokenizer.context_length - 3
    return _joined(pairs, parts, texts_of, left_out, max_tokens, image_size=image_size, crop=crop)


@torch.no_grad()
def features(
    model: CoCa,
    labelled: Labelled,
    device: torch.device,
    *,
    image_size: int,
    crop: Crop,
    patches: bool = False,
    progress: bool = False,
) -> Features | None:
    """Compute the embeddings of labelled images and, with `patches`, the input of the poolers, of n p d numbers.

    All processes call it with the whole model; rank 0 gets the result, the others None. Images with the label IGNORE
    are skipped, unreadable ones left out and named. Raises ValueError if an image has several labels, or if no image
    remains.
    """
    _, first = np.unique(labelled.image_of, return_index=True)
    if len(first) < len(labelled):
        raise ValueError(
            f"features: each image must have one label, got {len(labelled)} labels of {len(first)} images; use "
            "recipes/finetune_classifier.py for questions about images"
        )

    def work(pixels: Tensor, members: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        read = model.pooler_norm(encode_pixels(model.vision_encoder, pixels)).cpu() if patches else torch.empty(0)
        return model.encode_image(pixels).cpu(), read, torch.from_numpy(labelled.labels[members])

    items = np.flatnonzero(labelled.labels != IGNORE).tolist()
    with evaluating(model):
        parts, left_out = over_images(
            labelled,
            items,
            work,
            device,
            image_size=image_size,
            crop=crop,
            progress="labelled images" if progress else None,
        )
    if dist.get_rank() > 0:
        return None
    if not parts:
        raise ValueError(f"features: one labelled image must be readable, got none: {_some(left_out)}; check the data")
    embeddings, read, labels = (torch.cat(x) for x in zip(*parts, strict=True))
    return Features(labelled, embeddings, read, labels, left_out)


def over_images(
    pairs: Pairs,
    items: list[int],
    work: Callable[[Tensor, list[int]], R],
    device: torch.device,
    *,
    image_size: int,
    crop: Crop,
    progress: str | None = None,
) -> tuple[list[R], dict[str, str]]:
    """Call work(uint8 [b, 3, h, w], items) on the images of some pairs, in batches of 50 consecutive ones.

    Each batch is computed by one process; rank 0 gets the results in the order of the items, the others an empty list.
    The second result maps names of unreadable images, which no batch contains, to causes. Images of the next batch are
    read in threads meanwhile. A progress bar is shown if it is named.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    parts = list(batches(items, BATCH))

    def read(i: int) -> Tensor:
        return pairs.load(i, size=image_size, crop=crop)

    def results() -> Iterator[tuple[list[R], dict[str, str]]]:
        for good, pixels, bad in read_batches(read, parts[rank::world]):
            result = [] if pixels is None else [work(pixels.to(device), good)]
            yield result, {pairs.ids[i]: why for i, why in bad.items()}

    mine = results()
    done: list[R] = []
    unread: dict[str, str] = {}
    with tqdm(total=len(items), desc=progress, unit="image", disable=progress is None or rank > 0) as bar:
        for start in range(0, len(parts), world):
            part: list[Any] | None = [None] * world if rank == 0 else None
            dist.gather_object(next(mine, ([], {})), part)
            for result, bad in part or []:
                done += result
                unread |= bad
            bar.update(sum(map(len, parts[start : start + world])))
    return done, unread


class _Part(NamedTuple):
    """Outputs of a batch of images."""

    members: list[int]
    image_embeddings: Tensor
    texts: list[tuple[list[int], TextOutputs]]  # batches of pairs
    written: list[str]


def _texts_of_images(pairs: Pairs, count: int | None) -> tuple[dict[int, list[int]], dict[str, str]]:
    """Returns the pairs with a caption of each of the first `count` images, by its first pair; and empty captions."""
    images, first = np.unique(pairs.image_of, return_index=True)
    first_of = dict(zip(images.tolist(), first.tolist(), strict=True))
    texts_of: dict[int, list[int]] = {i: [] for i in sorted(first.tolist())[:count]}
    left_out = {}
    for t, image in enumerate(pairs.image_of.tolist()):
        if first_of[image] not in texts_of:
            continue
        if pairs.captions[t].strip():
            texts_of[first_of[image]].append(t)
        else:
            left_out[pairs.ids[t]] = "its caption is empty"
    return {i: texts for i, texts in texts_of.items() if texts}, left_out


def _joined(
    pairs: Pairs,
    parts: list[_Part],
    texts_of: dict[int, list[int]],
    left_out: dict[str, str],
    max_tokens: int,
    *,
    image_size: int,
    crop: Crop,
) -> ModelOutputs:
    """Join the outputs of all batches, with the captions in the order of the data."""
    members = [i for part in parts for i in part.members]
    row = {i: n for n, i in enumerate(members)}
    texts = [some for part in parts for _, some in part.texts]
    rows, owners = (
        [t for part in parts for some, _ in part.texts for t in some],
        [row[i] for i in members for _ in texts_of[i]],
    )
    order = np.argsort(rows).tolist()  # captions of one image need not be consecutive
    return ModelOutputs(
        pairs,
        image_size,
        crop,
        members,
        [rows[k] for k in order],
        torch.tensor(owners)[order],
        torch.cat([part.image_embeddings for part in parts]),
        torch.cat([some.text_embeddings for some in texts])[order],
        torch.cat([some.token_losses for some in texts])[order],
        torch.cat([some.tokens for some in texts])[order],
        texts[0].scale,
        texts[0].bias,
        torch.cat([some.truncated for some in texts])[order],
        max_tokens,
        [caption for part in parts for caption in part.written],
        left_out,
    )


def _left_out_facts(left_out: dict[str, str]) -> dict[str, Any]:
    return {"left_out": len(left_out), "left_out_names": left_out}


def _skipped_facts(records: Records | None) -> dict[str, Any]:
    """Returns the number of records that a reader of files skipped, and the first names by cause."""
    return {} if records is None else {"skipped": records.skipped.total(), "skipped_names": records.names}


def _some(left_out: dict[str, str]) -> str:
    return "; ".join(f"{name}: {cause}" for name, cause in list(left_out.items())[:3])
