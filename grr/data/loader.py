"""Batches of a run: every process reads its columns of the global batches, decoded in threads, in one fixed order.

Where a run stands in its data is one number, the optimizer steps it has taken: what step k holds follows from the seed,
k and batch_size alone, however many processes, micro-batches and threads there are.
"""

import atexit
import logging
import math
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.nodes import BaseNode, Batcher, IterableWrapper, ParallelMapper, PinMemory, Prefetcher

from grr.data.collate import IGNORE, collate_captions
from grr.data.images import BadImage, Crop
from grr.data.labelled import Labelled
from grr.data.order import epoch_order, num_batches
from grr.data.pairs import Pairs
from grr.data.threads import in_thread
from grr.files.printable import printable
from grr.seeds import derive_seed
from grr.tokenizers import Tokenizer

TRIES = 20  # samples read for one place of a batch before the run stops
ENOUGH = 100  # samples read before max_bad_fraction is applied

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """One micro-batch of one process."""

    images: Tensor  # uint8 [b, 3, h, w]
    ids: Tensor  # int64 [b, t], as `collate_captions` gives them
    positions: Tensor  # int64 [b, t]
    labels: Tensor  # int64 [b, t - 2]
    names: list[str]  # of the samples in their data
    replaced: int  # bad samples that others stand in for, or that a validation leaves out
    classes: Tensor | None = None  # int64 [b], of labelled data
    contrast: bool = True  # False: pairs of a validation that fill no contrastive batch
    kept: Tensor | None = None  # bool [b], the rows that are samples: others only fill the batch; None: all

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device; from pinned memory, without waiting until they are there."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory, from where a GPU can fetch them by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        classes = None if self.classes is None else f(self.classes)
        tensors = (f(self.images), f(self.ids), f(self.positions), f(self.labels))
        kept = None if self.kept is None else f(self.kept)
        return Batch(*tensors, self.names, self.replaced, classes, self.contrast, kept)


def steps_per_epoch(pairs: Pairs, batch_size: int) -> int:
    """The optimizer steps of an epoch, the same in every epoch: what does not fill a global batch is left out."""
    return num_batches(pairs.image_of, batch_size=batch_size)


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
    *,
    workers: int = 2,
    prefetch: int = 4,
    crop: Crop = "squash",
    max_bad_fraction: float = 0.1,
) -> Iterator[list[Batch]]:
    """The micro-batches of this process for each optimizer step, counted from 0, from start_step on without end.

    A step reads batch_size samples: a row of `epoch_order`, of which micro-batch m of process r holds the columns from
    (m * world + r) * micro_batch_size on. `workers` threads read samples, and `prefetch` micro-batches are kept ready;
    with workers=0 all is read, without threads, when it is asked for.

    A bad sample (an unreadable image, an empty caption) is logged as a warning and replaced by one of an image that
    the global batch does not hold: always by the same, and by another for each, as long as there are enough images.
    Raises ValueError naming some where, of at least 100 samples that this process read, more than max_bad_fraction are
    bad, or where 20 in a row are, or all that could stand in for one; and at once where an argument is out of range,
    batch_size not a multiple of world * micro_batch_size, or larger than the number of images.
    """
    _check_batches(batch_size, micro_batch_size, world)
    per_epoch = steps_per_epoch(pairs, batch_size)
    starts = range(rank * micro_batch_size, batch_size, world * micro_batch_size)
    columns = [column for start in starts for column in range(start, start + micro_batch_size)]
    rows = _training_rows(pairs.image_of, seed, start_step, per_epoch, batch_size, columns)
    return _steps(
        rows, pairs, tokenizer, micro_batch_size, image_size, pin_memory, workers, prefetch, crop, max_bad_fraction
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
    *,
    workers: int = 2,
    prefetch: int = 4,
    crop: Crop = "squash",
    max_bad_fraction: float = 0.1,
) -> Iterator[list[Batch]]:
    """The micro-batches of this process for a validation: every pair once, in batches that never change.

    First come the contrastive batches, of min(batch_size, number of images) pairs each, no two of one image: the first
    epoch of seed 0. The pairs that fill no such batch follow with `contrast` false. A batch is cut into micro-batches
    of at most micro_batch_size that are equally many and equally large in every process; rows that only fill one have
    no name and no label. So has the row of a bad sample, which is logged and left out. Raises ValueError as training
    does, and if there are fewer than two images.
    """
    _check_batches(batch_size, micro_batch_size, world)
    images = len(np.unique(pairs.image_of))
    if images < 2:
        raise ValueError(
            f"data: a validation needs two images or more, to contrast one with another, got {images}; "
            "add images to the section validation"
        )
    size = min(batch_size, images)
    rounds = math.ceil(size / (world * micro_batch_size))
    micro_batch_size = math.ceil(size / (world * rounds))
    rows = _validation_rows(pairs.image_of, size, micro_batch_size, rank, world)
    return _steps(
        rows, pairs, tokenizer, micro_batch_size, image_size, pin_memory, workers, prefetch, crop, max_bad_fraction
    )


def _check_batches(batch_size: int, micro_batch_size: int, world: int) -> None:
    if batch_size <= 0 or micro_batch_size <= 0 or batch_size % (world * micro_batch_size):
        share = gcd(batch_size // world, micro_batch_size) if batch_size > 0 and batch_size % world == 0 else 0
        remedy = f"run.micro_batch_size={share} fits" if share > 0 else "change either size"
        raise ValueError(
            f"data: batch_size must be a multiple of processes * micro_batch_size, got {batch_size=}, "
            f"{world=}, {micro_batch_size=}; {remedy}"
        )


def _steps(
    rows: Iterable["_Row"],
    pairs: Pairs,
    tokenizer: Tokenizer,
    micro_batch_size: int,
    image_size: int,
    pin_memory: bool,
    workers: int,
    prefetch: int,
    crop: Crop,
    max_bad_fraction: float,
) -> Iterator[list[Batch]]:
    """Check the arguments, lay the pipeline, and have it stopped when the program ends."""
    if workers < 0 or prefetch < 1 or not 0 <= max_bad_fraction <= 1:
        raise ValueError(
            f"data: it takes workers >= 0, prefetch >= 1 and max_bad_fraction from 0 to 1, "
            f"got {workers=}, {prefetch=}, {max_bad_fraction=}"
        )
    stop = threading.Event()
    read = in_thread(partial(_read, pairs=pairs, tokenizer=tokenizer, image_size=image_size, crop=crop))
    node = ParallelMapper(IterableWrapper(_places(rows, stop)), read, workers, method="thread", snapshot_frequency=0)
    node = Batcher(node, micro_batch_size)
    node = ParallelMapper(node, partial(_collate, pad_id=tokenizer.pad_id), num_workers=0)
    if pin_memory:
        node = PinMemory(node, snapshot_frequency=0)
    if workers:
        node = Prefetcher(node, prefetch, snapshot_frequency=0)
    steps = _consume(node, max_bad_fraction, stop)
    _running.add(steps)
    return steps


class _Row(NamedTuple):
    """What this process reads of a global batch: some columns of it; a column beyond its end fills a micro-batch."""

    seed: int
    epoch: int
    k: int
    samples: NDArray[np.int64]
    columns: Sequence[int]
    validation: bool = False
    contrast: bool = True


class _Place(NamedTuple):
    """A place in a global batch."""

    row: _Row
    column: int
    last: bool  # of this process in this step


class _Bad(NamedTuple):
    name: str
    cause: str


class _Sample(NamedTuple):
    """What was read for a place: no ids where all that was tried is bad, no name where it only fills a batch."""

    name: str
    image: Tensor
    ids: list[int]
    bad: list[_Bad]
    place: _Place
    label: int | None = None


def _training_rows(
    groups: NDArray[np.int64], seed: int, start_step: int, per_epoch: int, batch_size: int, columns: Sequence[int]
) -> Iterator[_Row]:
    """The global batches from start_step on, without end."""
    drawn = -1
    for number in count(start_step):
        epoch, k = divmod(number, per_epoch)
        if epoch != drawn:
            order, drawn = epoch_order(groups, seed=seed, epoch=epoch, batch_size=batch_size), epoch
        yield _Row(seed, epoch, k, order[k], columns)


def _validation_rows(
    groups: NDArray[np.int64], size: int, micro_batch_size: int, rank: int, world: int
) -> Iterator[_Row]:
    """Contrastive batches of `size` pairs, then the pairs that none of them holds."""
    order = epoch_order(groups, seed=0, epoch=0, batch_size=size)
    left = np.setdiff1d(np.arange(len(groups)), order)
    batches = [(samples, True) for samples in order]
    batches += [(left[start : start + size], False) for start in range(0, len(left), size)]
    for k, (samples, contrast) in enumerate(batches):
        starts = range(
            rank * micro_batch_size,
            world * micro_batch_size * math.ceil(len(samples) / (world * micro_batch_size)),
            world * micro_batch_size,
        )
        columns = [column for start in starts for column in range(start, start + micro_batch_size)]
        yield _Row(0, 0, k, samples, columns, True, contrast)


def _places(rows: Iterable[_Row], stop: threading.Event) -> Iterator[_Place]:
    """What this process has to read, step by step, until stop is set."""
    for row in rows:
        for column in row.columns:
            if stop.is_set():
                return
            yield _Place(row, column, column == row.columns[-1])


def _read(place: _Place, pairs: Pairs, tokenizer: Tokenizer, image_size: int, crop: Crop) -> _Sample:
    """Read the sample of a place, or else the first good substitute."""
    bad: list[_Bad] = []
    for i in islice(_candidates(place, pairs.image_of), 1 if place.row.validation else TRIES):
        name, caption = pairs.ids[i], pairs.captions[i]
        try:
            if not caption.strip():
                raise BadImage("its caption is empty")
            label = int(pairs.labels[i]) if isinstance(pairs, Labelled) else None
            image = pairs.load(i, size=image_size, crop=crop)
            return _Sample(name, image, tokenizer.encode(caption), bad, place, label)
        except (BadImage, OSError) as error:
            bad.append(_Bad(name, str(error) or type(error).__name__))
    if not place.row.validation:
        return _Sample("", torch.empty(0), [], bad, place)
    blank = torch.zeros(3, image_size, image_size, dtype=torch.uint8)
    return _Sample("", blank, tokenizer.encode(""), bad, place, IGNORE if isinstance(pairs, Labelled) else None)


def _candidates(place: _Place, groups: NDArray[np.int64]) -> Iterator[int]:
    """The sample of a place, then others to put there instead: one each of groups that are not in its row.

    All places of a row see the same list of them. Each takes what no other place does, while there is such.
    """
    row, column = place.row, place.column
    if column >= len(row.samples):
        return
    yield int(row.samples[column])
    b = len(row.samples)
    rng = np.random.Generator(np.random.PCG64(derive_seed(row.seed, row.epoch, row.k)))
    drawn = rng.choice(len(groups), size=min(len(groups), 2 * TRIES * b), replace=False)
    drawn = drawn[~np.isin(groups[drawn], groups[row.samples])]
    _, first = np.unique(groups[drawn], return_index=True)
    spare = drawn[np.sort(first)].tolist()
    turn = column % max(1, len(spare))
    yield from dict.fromkeys(chain(spare[column::b], spare[turn:], spare[:turn]))


def _collate(samples: list[_Sample], pad_id: int) -> tuple[Batch | None, list[_Bad], bool]:
    """A micro-batch, none where a place is empty; the bad samples that were met; and whether it ends its step."""
    bad = [b for sample in samples for b in sample.bad]
    place = samples[-1].place
    if not all(sample.ids for sample in samples):
        return None, bad, place.last
    ids, positions, labels = collate_captions([sample.ids for sample in samples], pad_id=pad_id)
    kept = None
    if place.row.validation:
        kept = torch.tensor([sample.name != "" for sample in samples])
        labels[~kept] = IGNORE
    images = torch.stack([sample.image for sample in samples])  # [b, 3, h, w]
    classes = None if samples[0].label is None else torch.tensor([sample.label for sample in samples])  # [b]
    names = [sample.name for sample in samples if sample.name]
    batch = Batch(images, ids, positions, labels, names, len(bad), classes, place.row.contrast, kept)
    return batch, bad, place.last


def _consume(
    node: BaseNode[tuple[Batch | None, list[_Bad], bool]], max_bad_fraction: float, stop: threading.Event
) -> Generator[list[Batch], None, None]:
    """Gather micro-batches to steps, and watch how many samples are bad. Closing it ends the threads of node."""
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
                    f"data: no readable sample was found for a place in a batch, among those tried: "
                    f"{_some(bad)}; check where the data lie, take bad samples out, or lower batch_size "
                    f"so that there are images to spare"
                )
            tried += len(batch.names) + len(bad)
            if tried >= ENOUGH and len(all_bad) > max_bad_fraction * tried:
                raise ValueError(
                    f"data: more than {max_bad_fraction=} of the samples are bad, {len(all_bad)} of "
                    f"{tried}: {_some(all_bad)}; mend them, or raise max_bad_fraction"
                )
            step.append(batch)
            if last:
                yield step
                step = []
    finally:
        stop.set()
        del node  # its threads end with it


def _some(bad: list[_Bad]) -> str:
    return "; ".join(f"{printable(name)}: {printable(cause)}" for name, cause in bad[:3])


_running: weakref.WeakSet[Generator[list[Batch], None, None]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A thread that is still inside torch when the interpreter goes brings the process down with an abort."""
    for steps in list(_running):
        steps.close()
