"""Batches of a run: every process reads its columns of the global batches, decoded in threads, in one fixed order.

The state of the data is one number, the optimizer step: the samples of step k depend only on the seed, k and
batch_size, for any number of processes, micro-batches and threads.
"""

import atexit
import logging
import math
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.nodes import BaseNode, Batcher, IterableWrapper, ParallelMapper, PinMemory, Prefetcher

from grr.data.collate import IGNORE, LongestFirst, collate_captions
from grr.data.images import BadImage, Crop
from grr.data.labelled import Labelled
from grr.data.order import Epochs, block_epochs, check_batches
from grr.data.pairs import Pairs
from grr.data.threads import in_thread
from grr.files.printable import printable
from grr.seeds import derive_seed
from grr.tokenizers import Tokenizer

MAX_TRIES = 20  # samples read for one slot of a batch before the run stops
MIN_SAMPLES = 100  # samples read before max_bad_fraction is applied

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """One micro-batch of one process."""

    images: Tensor  # uint8 [b, 3, h, w]
    ids: Tensor  # int64 [b, t]; this and the next five as `collate_captions` returns them
    positions: Tensor  # int64 [b, t]
    cls_places: Tensor  # int64 [b]
    label_places: Tensor  # int64 [n]
    labels: Tensor  # int64 [n]
    num_labels: int
    names: list[str]  # ids of the samples
    replaced: int  # bad samples that were replaced, or that a validation leaves out
    classes: Tensor | None = None  # int64 [b], of labelled data
    contrast: bool = True  # False: pairs of a validation that do not fill a contrastive batch
    kept: Tensor | None = None  # bool [b], true for samples, false for rows that only fill the batch; None: all true

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device; asynchronously from pinned memory."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory, from which a GPU copies asynchronously."""
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {name: f(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


def steps_per_epoch(pairs: Pairs, batch_size: int) -> int:
    """Returns the number of optimizer steps of an epoch; samples that do not fill a global batch are left out."""
    return pairs.groups.num_batches(batch_size)


def training_steps(
    pairs: Pairs,
    tokenizer: Tokenizer,
    rank: int,
    world: int,
    seed: int,
    start_step: int,
    batch_size: int,
    micro_batch_size: int,
    image_size: int,
    pin_memory: bool,
    longest_first: bool = False,
    text_multiple: int = 1,
    *,
    workers: int = 2,
    prefetch: int = 4,
    crop: Crop | None = None,
    block: int | None = None,
    max_bad_fraction: float = 0.1,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of this process for each optimizer step, from start_step (counted from 0) without end.

    A step reads batch_size samples: a batch of `Epochs`, of which micro-batch m of process r holds the columns from
    (m * world + r) * micro_batch_size on. `workers` threads read samples, and up to `prefetch` micro-batches are read
    ahead; with workers=0 the caller's thread reads each micro-batch when it is needed.

    block: read neighbouring samples near in time, for disks that are slow to seek; see `BlockEpochs`.

    longest_first: order the row by the length of its captions in tokens before it is cut, so that micro-batch m of all
    processes has captions of similar length, and little padding. The pairs of a global batch stay the same, and with
    global negatives its loss; each draws its dropout by its place in the new order. With local negatives the
    micro-batches would be other tasks.

    text_multiple: the length of texts is rounded up to a multiple of it (`grr.parallel.compiled.text_multiple`).

    A bad sample (an unreadable image, an empty caption) is logged as a warning and replaced by a substitute from an
    image that the global batch does not hold. Substitutes are deterministic, and distinct while there are enough
    images. Raises ValueError, with some names, if more than max_bad_fraction of at least 100 samples of this process
    are bad, or 20 in a row, or all substitutes for one; and at the call if an argument is out of range, if batch_size
    is not a multiple of world * micro_batch_size, or if it is larger than the number of images.
    """
    check_batches(batch_size, micro_batch_size, world)
    epochs = block_epochs(pairs.groups, pairs.image_of, seed=seed, batch_size=batch_size, block=block)
    starts = range(rank * micro_batch_size, batch_size, world * micro_batch_size)
    columns = [column for start in starts for column in range(start, start + micro_batch_size)]
    rows = _training_rows(epochs, start_step, columns)
    if longest_first:
        arranged = LongestFirst(pairs.captions, tokenizer.encode, pad_id=tokenizer.pad_id)
        rows = (row._replace(samples=arranged(row.samples)) for row in rows)
    return _steps(
        rows,
        pairs,
        tokenizer,
        micro_batch_size,
        image_size,
        pin_memory,
        text_multiple,
        workers,
        prefetch,
        crop or "squash",
        max_bad_fraction,
    )


def validation_steps(
    pairs: Pairs,
    tokenizer: Tokenizer,
    rank: int,
    world: int,
    batch_size: int,
    micro_batch_size: int,
    image_size: int,
    pin_memory: bool,
    text_multiple: int = 1,
    *,
    workers: int = 2,
    prefetch: int = 4,
    crop: Crop | None = None,
    block: int | None = None,
    max_bad_fraction: float = 0.1,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of this process for a validation: every pair once, in batches that never change.

    First come the contrastive batches, of min(batch_size, number of images) pairs each, no two of one image: the first
    epoch of seed 0. The pairs that do not fill such a batch follow with `contrast` false. A batch is split into
    micro-batches of at most micro_batch_size, with equal numbers and sizes in every process; rows that only fill one
    have neither name nor label. A bad sample is logged and becomes such a row. Raises ValueError as `training_steps`
    does, and if there are fewer than two images.
    """
    check_batches(batch_size, micro_batch_size, world)
    images = pairs.groups.count
    if images < 2:
        raise ValueError(
            f"data: a validation needs at least two images for the contrastive loss, got {images}; "
            "add images to the section validation"
        )
    size = min(batch_size, images)
    micro_batches = math.ceil(size / (world * micro_batch_size))
    micro_batch_size = math.ceil(size / (world * micro_batches))
    epochs = block_epochs(pairs.groups, pairs.image_of, seed=0, batch_size=size, block=block)
    rows = _validation_rows(epochs, micro_batch_size, rank, world)
    return _steps(
        rows,
        pairs,
        tokenizer,
        micro_batch_size,
        image_size,
        pin_memory,
        text_multiple,
        workers,
        prefetch,
        crop or "squash",
        max_bad_fraction,
    )


def _steps(
    rows: Iterable["_Row"],
    pairs: Pairs,
    tokenizer: Tokenizer,
    micro_batch_size: int,
    image_size: int,
    pin_memory: bool,
    text_multiple: int,
    workers: int,
    prefetch: int,
    crop: Crop,
    max_bad_fraction: float,
) -> Iterator[list[Batch]]:
    """Check the arguments, build the pipeline, and register it to be stopped when the program ends."""
    if workers < 0 or prefetch < 1 or not 0 <= max_bad_fraction <= 1:
        raise ValueError(
            "data: workers must be >= 0, prefetch >= 1 and max_bad_fraction from 0 to 1, "
            f"got {workers=}, {prefetch=}, {max_bad_fraction=}"
        )
    stop = threading.Event()
    read = in_thread(partial(_read, pairs=pairs, tokenizer=tokenizer, image_size=image_size, crop=crop))
    node = ParallelMapper(IterableWrapper(_slots(rows, stop)), read, workers, method="thread", snapshot_frequency=0)
    node = Batcher(node, micro_batch_size)
    node = ParallelMapper(node, partial(_collate, pad_id=tokenizer.pad_id, text_multiple=text_multiple), num_workers=0)
    if pin_memory:
        node = PinMemory(node, snapshot_frequency=0)
    if workers:
        node = Prefetcher(node, prefetch, snapshot_frequency=0)
    steps = _consume(node, max_bad_fraction, stop)
    _running.add(steps)
    return steps


class _Row(NamedTuple):
    """Columns of a global batch that this process reads; a column beyond its end fills a micro-batch."""

    seed: int
    epoch: int
    k: int
    samples: NDArray[np.int64]
    columns: Sequence[int]
    validation: bool = False
    contrast: bool = True


class _Slot(NamedTuple):
    """Slot of a global batch, which holds one sample."""

    row: _Row
    column: int
    last: bool  # of this process in this step


class _Bad(NamedTuple):
    name: str
    cause: str


class _Sample(NamedTuple):
    """Sample read for a slot; without ids if all candidates are bad, without a name if it only fills a batch."""

    name: str
    image: Tensor
    ids: list[int]
    bad: list[_Bad]
    slot: _Slot
    label: int | None = None


def _training_rows(epochs: Epochs, start_step: int, columns: Sequence[int]) -> Iterator[_Row]:
    """Yield the global batches from start_step on, without end."""
    for step in count(start_step):
        epoch, k = divmod(step, epochs.num_batches)
        yield _Row(epochs.seed, epoch, k, epochs.batch(epoch, k), columns)


def _validation_rows(epochs: Epochs, micro_batch_size: int, rank: int, world: int) -> Iterator[_Row]:
    """Yield the contrastive batches of the first epoch, then the pairs that none of them holds."""
    size, order = epochs.batch_size, epochs.batches(0)
    rest = np.setdiff1d(np.arange(epochs.groups.samples), order)
    batches = [(samples, True) for samples in order]
    batches += [(rest[start : start + size], False) for start in range(0, len(rest), size)]
    stride = world * micro_batch_size  # columns that all processes read together
    for k, (samples, contrast) in enumerate(batches):
        starts = range(rank * micro_batch_size, stride * math.ceil(len(samples) / stride), stride)
        columns = [column for start in starts for column in range(start, start + micro_batch_size)]
        yield _Row(0, 0, k, samples, columns, True, contrast)


def _slots(rows: Iterable[_Row], stop: threading.Event) -> Iterator[_Slot]:
    """Yield the slots that this process reads, step by step, until stop is set."""
    for row in rows:
        for column in row.columns:
            if stop.is_set():
                return
            yield _Slot(row, column, column == row.columns[-1])


def _read(slot: _Slot, pairs: Pairs, tokenizer: Tokenizer, image_size: int, crop: Crop) -> _Sample:
    """Read the sample of a slot, or the first good substitute."""
    bad: list[_Bad] = []
    if not slot.row.validation:
        pairs = pairs.for_epoch(slot.row.seed, slot.row.epoch)
    for i in islice(_candidates(slot, pairs.image_of), 1 if slot.row.validation else MAX_TRIES):
        name, caption = pairs.ids[i], pairs.captions[i]
        try:
            if not caption.strip():
                raise BadImage("its caption is empty")
            label = int(pairs.labels[i]) if isinstance(pairs, Labelled) else None
            image = pairs.load(i, size=image_size, crop=crop)
            return _Sample(name, image, tokenizer.encode(caption), bad, slot, label)
        except (BadImage, OSError) as error:
            bad.append(_Bad(name, str(error) or type(error).__name__))
    if not slot.row.validation:
        return _Sample("", torch.empty(0), [], bad, slot)
    black = torch.zeros(3, image_size, image_size, dtype=torch.uint8)
    return _Sample("", black, tokenizer.encode(""), bad, slot, IGNORE if isinstance(pairs, Labelled) else None)


def _candidates(slot: _Slot, groups: NDArray[np.int64]) -> Iterator[int]:
    """Yield the sample of a slot, then its substitutes, one from each group that is not in its row.

    All slots of a row draw the same list of substitutes, and each begins with those that no other slot begins with.
    """
    row, column = slot.row, slot.column
    if column >= len(row.samples):
        return
    yield int(row.samples[column])
    b = len(row.samples)
    rng = np.random.Generator(np.random.PCG64(derive_seed(row.seed, row.epoch, row.k)))
    drawn = rng.choice(len(groups), size=min(len(groups), 2 * MAX_TRIES * b), replace=False)
    drawn = drawn[~np.isin(groups[drawn], groups[row.samples])]
    _, first = np.unique(groups[drawn], return_index=True)
    substitutes = drawn[np.sort(first)].tolist()
    offset = column % max(1, len(substitutes))
    yield from dict.fromkeys(chain(substitutes[column::b], substitutes[offset:], substitutes[:offset]))


def _collate(samples: list[_Sample], pad_id: int, text_multiple: int) -> tuple[Batch | None, list[_Bad], bool]:
    """Returns a micro-batch, None if a slot is empty; its bad samples; and whether it is the last of its step."""
    bad = [b for sample in samples for b in sample.bad]
    slot = samples[-1].slot
    if not all(sample.ids for sample in samples):
        return None, bad, slot.last
    kept = [sample.name != "" for sample in samples] if slot.row.validation else None
    ids = [sample.ids for sample in samples]
    captions = collate_captions(ids, pad_id=pad_id, labelled=kept, text_multiple=text_multiple)
    images = torch.stack([sample.image for sample in samples])  # [b, 3, h, w]
    classes = None if samples[0].label is None else torch.tensor([sample.label for sample in samples])  # [b]
    names = [sample.name for sample in samples if sample.name]
    rows = None if kept is None else torch.tensor(kept)
    batch = Batch(images, *captions, names, len(bad), classes, slot.row.contrast, rows)
    return batch, bad, slot.last


def _consume(
    node: BaseNode[tuple[Batch | None, list[_Bad], bool]], max_bad_fraction: float, stop: threading.Event
) -> Generator[list[Batch], None, None]:
    """Group micro-batches into steps and check the fraction of bad samples. Closing it ends the threads of node."""
    tried = 0
    all_bad: list[_Bad] = []
    step: list[Batch] = []
    try:
        for batch, bad, last in node:
            for name, cause in bad:
                done = "replaced" if batch is None or batch.kept is None else "left out"
                logger.warning("bad sample %s, %s: %s", printable(name), done, printable(cause))
            all_bad += bad
            if batch is None:
                raise ValueError(
                    f"data: no readable sample was found for a slot of a batch, among those tried: {_examples(bad)}; "
                    "check the paths of the data, remove bad samples, or lower batch_size to have more substitutes"
                )
            tried += len(batch.names) + len(bad)
            if tried >= MIN_SAMPLES and len(all_bad) > max_bad_fraction * tried:
                raise ValueError(
                    f"data: more than {max_bad_fraction=} of the samples are bad, {len(all_bad)} of {tried}: "
                    f"{_examples(all_bad)}; repair them, or raise max_bad_fraction"
                )
            step.append(batch)
            if last:
                yield step
                step = []
    finally:
        stop.set()
        del node  # its threads end with it


def _examples(bad: list[_Bad]) -> str:
    return "; ".join(f"{printable(name)}: {printable(cause)}" for name, cause in bad[:3])


_running: weakref.WeakSet[Generator[list[Batch], None, None]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Stop all pipelines: a thread that is inside torch when the interpreter exits aborts the process."""
    for steps in list(_running):
        steps.close()
