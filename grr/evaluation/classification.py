"""The loss, gradients and accuracy of a classifier, which depend on the global batch alone."""

import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from grr.data import Batch, Labelled
from grr.data.collate import IGNORE, collate_captions
from grr.data.images import BadImage, Crop
from grr.evaluation.examples import Answer
from grr.evaluation.outputs import over_images
from grr.models.coca import evaluating
from grr.models.head import at_least_float32
from grr.parallel.bf16 import recomputing
from grr.parallel.process_group import all_sum, on_rank_0
from grr.parallel.shard import unsharded
from grr.tokenizers import Tokenizer
from grr.training.step import seed_dropout

SHOWN = 24  # answers of the report

logger = logging.getLogger(__name__)


class Scores(NamedTuple):
    """The scores of a global batch, or of a data set."""

    loss: float  # cross-entropy, mean over what has a class
    accuracy: float  # fraction of all; what has no class is never right


def classification_step(
    model: nn.Module, batches: Sequence[Batch], seed: int, *, label_smoothing: float = 0.0
) -> Scores:
    """Add the gradients of one optimizer step to the model, and give its scores.

    `batches` are the micro-batches of this process, equally many and equally large everywhere; `seed` draws the
    dropout (`grr.training.step.seed_dropout`). The loss is the mean over the global batch; label_smoothing
    is the part of each target that is spread evenly over all classes (Szegedy et al. 2016).
    Raises ValueError if the data have no classes.
    """
    world = dist.get_world_size()
    labelled = int(all_sum(sum(int((_classes(batch) != IGNORE).sum()) for batch in batches))[0])
    loss, right = 0.0, 0
    for i, batch in enumerate(batches):
        keys = seed_dropout(batch, seed, i)
        logits = model(batch.images, batch.ids, positions=batch.positions, sample_keys=keys)  # [b, c]
        total = _cross_entropy(logits, _classes(batch), label_smoothing)
        with recomputing(model):
            (total * world / max(1, labelled)).backward()  # FSDP takes the mean over processes
        loss += total.item()
        right += _count_right(logits, _classes(batch))
    loss, all_right, samples = all_sum(loss, right, sum(len(batch.names) for batch in batches))
    return Scores(loss / max(1, labelled), all_right / samples)


@torch.no_grad()
def classification_scores(
    model: nn.Module, pairs: Labelled, tokenizer: Tokenizer, device: torch.device, *, image_size: int, crop: Crop
) -> Scores:
    """The scores of all samples, without dropout and without label smoothing; all processes share the work.

    The model may be sharded. Images that cannot be read are left out, and the log says how many. Raises ValueError if
    nothing is left.
    """

    def work(pixels: Tensor, members: list[int]) -> tuple[float, int, int, int]:
        texts = [tokenizer.encode(pairs.captions[i]) for i in members]
        ids, positions, _ = collate_captions(texts, pad_id=tokenizer.pad_id)
        logits = model(pixels, ids.to(device), positions=positions.to(device)).cpu()  # [b, c]
        classes = torch.from_numpy(pairs.labels[members])
        labelled = int((classes != IGNORE).sum())
        return _cross_entropy(logits, classes, 0.0).item(), _count_right(logits, classes), labelled, len(members)

    with evaluating(model), unsharded(model):
        parts, left_out = over_images(pairs, list(range(len(pairs))), work, device, image_size=image_size, crop=crop)

    def judge() -> Scores:
        some = "; ".join(f"{name}: {cause}" for name, cause in list(left_out.items())[:3])
        if not parts:
            raise ValueError(f"classification_scores: no image can be read: {some}; check where the data lie")
        if left_out:
            logger.warning("classification_scores: %d of %d are left out: %s", len(left_out), len(pairs), some)
        loss, right, labelled, samples = map(sum, zip(*parts, strict=True))
        return Scores(loss / max(1, labelled), right / samples)

    return on_rank_0(judge)


@torch.no_grad()
def answers(
    model: nn.Module, pairs: Labelled, tokenizer: Tokenizer, device: torch.device, *, image_size: int, crop: Crop
) -> list[Answer]:
    """Returns the predictions of a classifier for 24 samples, the same ones at each call, for a page to show.

    All processes call it alike. Images that cannot be read are left out.
    """
    images: dict[int, Tensor] = {}
    thumbnails: dict[int, Tensor] = {}
    for i in random.Random(0).sample(range(len(pairs)), min(SHOWN, len(pairs))):
        with suppress(BadImage, OSError):
            thumbnails[i] = pairs.thumbnail(i)
            images[i] = pairs.load(i, size=image_size, crop=crop)
    if not images:
        return []
    ids, positions, _ = collate_captions([tokenizer.encode(pairs.captions[i]) for i in images], pad_id=tokenizer.pad_id)
    with evaluating(model):
        logits = model(torch.stack(list(images.values())).to(device), ids.to(device), positions=positions.to(device))
    given = [pairs.classes[i] for i in logits.argmax(dim=-1).tolist()]
    right = [None if pairs.labels[i] == IGNORE else pairs.classes[pairs.labels[i]] for i in images]
    return [
        Answer(thumbnails[i], pairs.captions[i], own, true) for i, own, true in zip(images, given, right, strict=True)
    ]


def _classes(batch: Batch) -> Tensor:
    if batch.classes is None:
        raise ValueError(
            "classification: the data have no classes; take those of grr.data.LABELLED, or make your own "
            "grr.data.Labelled of pairs, classes and labels"
        )
    return batch.classes


def _cross_entropy(logits: Tensor, classes: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(
        at_least_float32(logits), classes, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )


def _count_right(logits: Tensor, classes: Tensor) -> int:
    return int((logits.argmax(dim=-1) == classes).sum())
