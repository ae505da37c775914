"""What a model makes of images and their captions: embeddings, the loss of every token, captions of its own.

Images are read in fixed batches, each of them by one process, and what comes of them is put together in the order of
the data. So any number of processes gives the numbers of one, bit for bit, if each computes with as many threads: torch
adds in another order with another number of them, and torchrun sets OMP_NUM_THREADS=1 unless it is set.
"""

from collections.abc import Callable, Iterator
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
from grr.data.images import Crop, normalize
from grr.generation.generate import generate
from grr.models.coca import CoCa, evaluating
from grr.tokenizers import Tokenizer

R = TypeVar("R")
BATCH = 50  # images at a time
TEXTS = 200  # of their captions at a time


@dataclass
class Observation:
    """What a model made of n images and their m captions, in the order of the data."""

    pairs: Pairs
    image_size: int
    crop: Crop
    images: list[int]  # [n], the first pair of each image
    texts: list[int]  # [m], the pairs of these images
    image_of_text: Tensor  # int64 [m], the row of each caption's image
    image_embeddings: Tensor  # float32 [n, e]
    text_embeddings: Tensor  # float32 [m, e]
    token_losses: Tensor  # float64 [m], of each caption the sum over its tokens
    tokens: Tensor  # int64 [m], and how many they are
    scale: float  # 1 / temperature
    bias: float
    written: list[str]  # [n] captions; none if they were not asked for
    left_out: dict[str, str]  # names of images that cannot be read and of captions that say nothing, and why

    @cached_property
    def references(self) -> list[list[str]]:
        """The captions that people wrote of each image: [n]."""
        result: list[list[str]] = [[] for _ in self.images]
        for t, i in zip(self.texts, self.image_of_text.tolist(), strict=True):
            result[i].append(self.pairs.captions[t])
        return result

    def facts(self) -> dict[str, Any]:
        """What an evaluation tells of its data."""
        return {
            "fingerprint": self.pairs.fingerprint,
            "images": len(self.images),
            "captions": len(self.texts),
            **_told(self.left_out),
        }

    def thumbnail(self, i: int) -> Tensor:
        """Image i for a page: uint8 [3, h, w]."""
        return self.pairs.thumbnail(self.images[i])


@dataclass
class Features:
    """What a frozen model sees in n labelled images, in the order of the data."""

    labelled: Labelled
    embeddings: Tensor  # float32 [n, e], unit length: the output of the contrastive pooler
    patches: Tensor  # [n, p, d], what the poolers read, in the model's own precision; empty if not asked for
    labels: Tensor  # int64 [n]
    left_out: dict[str, str]  # names of images that cannot be read, and why

    def facts(self) -> dict[str, Any]:
        """What an evaluation tells of its data."""
        return {"fingerprint": self.labelled.fingerprint, "images": len(self.labels), **_told(self.left_out)}


@torch.no_grad()
def observe(
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
) -> Observation | None:
    """Embed some pairs, judge every token of their captions, and write captions, if `generation` holds the options of
    `generate`; the first `images` images alone, if that is not None.

    Called by all processes, each of which holds the whole model; rank 0 has the result, the others None. An image is
    encoded once for all of its captions. What cannot be read is left out, and named. Raises ValueError if nothing is
    left.
    """
    texts_of, left_out = _texts_of_images(pairs, images)

    def work(pixels: Tensor, members: list[int]) -> _Part:
        context = model.image_context(pixels)  # [b, n, d]
        own = [(row, t) for row, i in enumerate(members) for t in texts_of[i]]
        heard = [_hear(model, pairs, tokenizer, context, some) for some in batches(own, TEXTS)]
        image_embeddings: dict[int, Tensor] = {}
        for (row, _), e in zip(own, (e for h in heard for e in h.image_embeddings), strict=True):
            image_embeddings.setdefault(row, e)
        written = [] if generation is None else generate(model, pixels, tokenizer, **generation)
        return _Part(members, torch.stack([image_embeddings[row] for row in range(len(members))]), heard, written)

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
        raise ValueError(f"observe: no image with a caption can be read: {_some(left_out)}; check where the data lie")

    members = [i for part in parts for i in part.members]
    row = {i: n for n, i in enumerate(members)}
    heard = [h for part in parts for h in part.heard]
    texts, owners = [t for h in heard for t in h.texts], [row[i] for i in members for _ in texts_of[i]]
    order = np.argsort(texts).tolist()  # captions of one image need not stand side by side
    return Observation(
        pairs,
        image_size,
        crop,
        members,
        [texts[k] for k in order],
        torch.tensor(owners)[order],
        torch.cat([part.image_embeddings for part in parts]),
        torch.cat([h.text_embeddings for h in heard])[order],
        torch.cat([h.token_losses for h in heard])[order],
        torch.cat([h.tokens for h in heard])[order],
        heard[0].scale,
        heard[0].bias,
        [w for part in parts for w in part.written],
        left_out,
    )


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
    """Look at labelled images: embed them and, if asked, keep what the poolers read, which takes n p d numbers.

    Called by all processes, each of which holds the whole model; rank 0 has the result, the others None. Images whose
    label is IGNORE are passed over, those that cannot be read are left out, and named.
    Raises ValueError if an image has several labels, or if nothing is left.
    """
    _, first = np.unique(labelled.image_of, return_index=True)
    if len(first) < len(labelled):
        raise ValueError(
            f"features: each image must stand once in data to classify, got {len(labelled)} labels of {len(first)} "
            "images; questions about images are for recipes/finetune_classifier.py"
        )

    def work(pixels: Tensor, members: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        seen = model.pooler_norm(model.vision_encoder(normalize(pixels))).cpu() if patches else torch.empty(0)
        return model.encode_image(pixels).cpu(), seen, torch.from_numpy(labelled.labels[members])

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
        raise ValueError(f"features: no labelled image can be read: {_some(left_out)}; check where the data lie")
    embeddings, seen, labels = (torch.cat(x) for x in zip(*parts, strict=True))
    return Features(labelled, embeddings, seen, labels, left_out)


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
    """Hand the images of some pairs, in batches of 50 consecutive ones, to work(uint8 [b, 3, h, w], their items).

    Each batch is one process's; rank 0 gets the results in the order of the items, the others get none. The second
    result are the names of images that cannot be read, and why; no batch holds those. Images are read in threads,
    those of the next batch while work is done on one. Progress is shown under a name, if there is one.
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


class _Heard(NamedTuple):
    """What came of some captions and their images: [m]."""

    texts: list[int]
    image_embeddings: Tensor
    text_embeddings: Tensor
    token_losses: Tensor
    tokens: Tensor
    scale: float
    bias: float


class _Part(NamedTuple):
    """What came of a batch of images."""

    members: list[int]
    image_embeddings: Tensor
    heard: list[_Heard]
    written: list[str]


def _texts_of_images(pairs: Pairs, count: int | None) -> tuple[dict[int, list[int]], dict[str, str]]:
    """The first pair of each image -> all of its pairs that have a caption, for the first `count` images that occur;
    and the names of pairs that have none."""
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


def _hear(model: CoCa, pairs: Pairs, tokenizer: Tokenizer, context: Tensor, some: list[tuple[int, int]]) -> _Heard:
    """Read captions beside their images: some are (row of context, pair)."""
    rows, texts = [row for row, _ in some], [t for _, t in some]
    packed = collate_captions([tokenizer.encode(pairs.captions[t]) for t in texts], pad_id=tokenizer.pad_id)
    ids, positions, labels = (x.to(context.device) for x in packed)
    output = model.from_context(context[rows], ids, positions=positions, labels=labels)
    assert output.token_losses is not None
    tokens = (packed[2] != IGNORE).sum(1)  # [m]
    sums = [x.sum() for x in output.token_losses.cpu().double().split(tokens.tolist())]
    return _Heard(
        texts,
        output.image_embeddings.cpu(),
        output.text_embeddings.cpu(),
        torch.stack(sums),
        tokens,
        output.scale.item(),
        output.bias.item(),
    )


def _told(left_out: dict[str, str]) -> dict[str, Any]:
    return {"left_out": len(left_out), "left_out_names": left_out}


def _some(left_out: dict[str, str]) -> str:
    return "; ".join(f"{name}: {cause}" for name, cause in list(left_out.items())[:3])
