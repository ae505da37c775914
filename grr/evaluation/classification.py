"""Loss, gradients and accuracy of a classifier, which depend on the global batch alone."""

import logging
import math
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
from grr.evaluation.metrics.vqa import vqa_accuracy
from grr.evaluation.outputs import over_images
from grr.models.coca import evaluating
from grr.models.head import at_least_float32
from grr.parallel.bf16 import recomputing
from grr.parallel.device import exact_dtype
from grr.parallel.process_group import on_rank_0, sum_over_processes
from grr.parallel.shard import gathered, reduce_gradients, unsharded
from grr.tokenizers import Tokenizer
from grr.training.step import seed_dropout

SHOWN = 24  # answers of the report

logger = logging.getLogger(__name__)


class Scores(NamedTuple):
    """Loss and accuracy of a global batch."""

    loss: float  # cross-entropy, mean over samples with a class
    accuracy: float  # fraction of all samples; a sample without a class counts as wrong


class DataScores(NamedTuple):
    """Loss and accuracy of a data set, as those of a batch."""

    loss: float
    accuracy: float
    vqa_accuracy: float | None  # mean over all samples; None for data without the answers of people

    def numbers(self) -> dict[str, float]:
        """Returns the scores that the data have, by their names."""
        return {name: score for name, score in self._asdict().items() if score is not None}


class StepScores(NamedTuple):
    """Scores of one optimizer step, on the device: the parts of this process, whose sums over processes are the scores.

    A training loop that reads them only where it logs them never waits for the device in between.
    """

    loss: Tensor  # float32 []
    accuracy: Tensor  # float32 []

    def read(self) -> Scores:
        """Returns the scores of the global batch. Waits for the device; all processes must call it."""
        return Scores(*sum_over_processes(torch.stack([x.float() for x in self])).tolist())


def classification_step(
    model: nn.Module, batches: Sequence[Batch], seed: int, *, label_smoothing: float = 0.0
) -> StepScores:
    """Compute the scores of one optimizer step, and add its gradients to the model.

    batches: the micro-batches of this process, equal in number and size in all processes; seed: of the dropout
    (`grr.training.step.seed_dropout`). The loss is the mean over the global batch; label_smoothing is the part of each
    target that is spread evenly over all classes (Szegedy et al. 2016). Nothing in a step waits for the device.
    Raises ValueError if the data have no classes.
    """
    world = dist.get_world_size()
    counts = torch.stack([(_classes(batch) != IGNORE).sum() for batch in batches]).sum()
    counts = counts.to(exact_dtype(counts.device))
    share = 1 / sum_over_processes(counts).clamp(min=1)  # of a sample in the mean over the global batch
    losses, right = list[Tensor](), list[Tensor]()
    with gathered(model):
        for i, batch in enumerate(batches):
            keys = seed_dropout(batch, seed, i)
            logits = model(batch.images, batch.ids, positions=batch.positions, sample_keys=keys)  # [b, c]
            loss = _cross_entropy(logits, _classes(batch), label_smoothing)
            if i == len(batches) - 1:
                reduce_gradients(model)
            with recomputing(model):
                (loss * world * share).backward()  # FSDP averages gradients over processes
            losses.append(loss.detach())
            right.append(_count_right(logits, _classes(batch)))
    samples = world * sum(len(batch.names) for batch in batches)
    return StepScores(torch.stack(losses).sum() * share, torch.stack(right).sum() / samples)


@torch.no_grad()
def classification_scores(
    model: nn.Module, pairs: Labelled, tokenizer: Tokenizer, device: torch.device, *, image_size: int, crop: Crop
) -> DataScores:
    """Compute the scores of all samples, without dropout and label smoothing; all processes share the work.

    The model may be sharded. Unreadable images are left out, and their number is logged. Of data with the answers of
    people, vqa_accuracy is the mean of `grr.evaluation.metrics.vqa.vqa_accuracy`. Raises ValueError if no image
    remains.
    """

    def work(pixels: Tensor, members: list[int]) -> tuple[float, int, int, int, float]:
        texts = [tokenizer.encode(pairs.captions[i]) for i in members]
        ids, positions, *_ = collate_captions(texts, pad_id=tokenizer.pad_id)
        logits = model(pixels, ids.to(device), positions=positions.to(device)).cpu()  # [b, c]
        classes = torch.from_numpy(pairs.labels[members])
        labelled = int((classes != IGNORE).sum())
        right = int(_count_right(logits, classes))
        credit = _credit(pairs, members, logits.argmax(dim=-1).tolist())
        return _cross_entropy(logits, classes, 0.0).item(), right, labelled, len(members), credit

    with evaluating(model), unsharded(model):
        parts, left_out = over_images(pairs, list(range(len(pairs))), work, device, image_size=image_size, crop=crop)

    def scores() -> DataScores:
        some = "; ".join(f"{name}: {cause}" for name, cause in list(left_out.items())[:3])
        if not parts:
            raise ValueError(
                f"classification_scores: one image must be readable, got none: {some}; check the path of the data"
            )
        if left_out:
            logger.warning("classification_scores: %d of %d are left out: %s", len(left_out), len(pairs), some)
        loss, right, labelled, samples, credit = map(sum, zip(*parts, strict=True))
        of_people = None if pairs.people is None else credit / samples
        return DataScores(loss / max(1, labelled), right / samples, of_people)

    return on_rank_0(scores)


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
    texts = [tokenizer.encode(pairs.captions[i]) for i in images]
    ids, positions, *_ = collate_captions(texts, pad_id=tokenizer.pad_id)
    with evaluating(model):
        logits = model(torch.stack(list(images.values())).to(device), ids.to(device), positions=positions.to(device))
    given = [pairs.classes[i] for i in logits.argmax(dim=-1).tolist()]
    right = [None if pairs.labels[i] == IGNORE else pairs.classes[pairs.labels[i]] for i in images]
    return [
        Answer(thumbnails[i], pairs.captions[i], predicted, true)
        for i, predicted, true in zip(images, given, right, strict=True)
    ]


def _classes(batch: Batch) -> Tensor:
    if batch.classes is None:
        raise ValueError(
            "classification: the data must have classes, got none; use a data set of grr.data.LABELLED, or build a "
            "grr.data.Labelled from pairs, classes and labels"
        )
    return batch.classes


def _cross_entropy(logits: Tensor, classes: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(
        at_least_float32(logits), classes, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )


def _credit(pairs: Labelled, members: Sequence[int], predicted: Sequence[int]) -> float:
    """Returns the sum of the VQA accuracies of predictions; 0 for data without the answers of people."""
    if pairs.people is None:
        return 0.0
    answers = zip(members, predicted, strict=True)
    return math.fsum(vqa_accuracy(pairs.classes[label], pairs.people[i].split("\n")) for i, label in answers)


def _count_right(logits: Tensor, classes: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == classes).sum()
