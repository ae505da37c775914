"""Batches of a run: every process reads its columns of the global batches, decoded in threads, in one fixed order.

Where a run stands in its data is one number, the optimizer steps it has taken: what step k holds follows from the seed,
k and batch_size alone, however many processes, micro-batches and threads there are.
"""

import atexit
import logging
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

from grr.data.labelled import Labelled
from grr.data.order import epoch_order, num_batches
from grr.data.pairs import Pairs
from grr.distributed import reset_seed
from grr.images import BadImage, Crop
from grr.packing import pack_captions
from grr.printable import printable
from grr.threads import in_thread
from grr.tokenizer import Tokenizer

TRIES = 20  # samples read for one place of a batch before the run stops
ENOUGH = 100  # samples read before max_bad_fraction is applied

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """One micro-batch of one process."""

    images: Tensor  # uint8 [b, 3, h, w]
    ids: Tensor  # int64 [b, t], as `pack_captions` gives them
    positions: Tensor  # int64 [b, t]
    labels: Tensor  # int64 [b, t - 2]
    names: list[str]  # of the samples in their data
    replaced: int  # bad samples that others stand in for
    classes: Tensor | None = None  # int64 [b], of labelled data

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device; from pinned memory, without waiting until they are there."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory, from where a GPU can fetch them by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        classes = None if self.classes is None else f(self.classes)
        return Batch(f(self.images), f(self.ids), f(self.positions), f(self.labels), self.names, self.replaced, classes)


def steps_per_epoch(pairs: Pairs, batch_size: int) -> int:
    """The optimizer steps of an epoch, the same in every epoch: what does not fill a global batch is left out."""
    return num_batches(pairs.image_of, batch_size=batch_size)


def training_steps(pairs: Pairs, tokenizer: Tokenizer, rank: int, world: int, seed: int, start_step: int,
                   batch_size: int, micro_batch_size: int, image_size: int, pin_memory: bool, *, workers: int = 2,
                   prefetch: int = 4, crop: Crop = "squash",
                   max_bad_fraction: float = 0.1) -> Iterator[list[Batch]]:  # fmt: skip
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
    return _steps(pairs, tokenizer, seed, count(start_step), rank, world, batch_size, micro_batch_size, image_size,
                  pin_memory, workers, prefetch, crop, max_bad_fraction)  # fmt: skip


def validation_steps(pairs: Pairs, tokenizer: Tokenizer, rank: int, world: int, batch_size: int,
                     micro_batch_size: int, image_size: int, pin_memory: bool, *, workers: int = 2, prefetch: int = 4,
                     crop: Crop = "squash", max_bad_fraction: float = 0.1) -> Iterator[list[Batch]]:  # fmt: skip
    """The same for one epoch, always that of seed 0: once over the data, in batches that never change.

    Data of fewer images than batch_size are read in batches of as many whole micro-batches for each process as they
    fill; where they do not fill one, the micro-batch is as large as they allow. Raises ValueError as training does,
    save that only data of fewer images than processes are too small.
    """
    images = len(np.unique(pairs.image_of))
    if images < world:
        raise ValueError(f"data: each process needs an image to validate on, got {images} images for {world=} "
                         f"processes; add images or use fewer processes")  # fmt: skip
    if images < batch_size:
        micro_batch_size = min(micro_batch_size, images // world)
        batch_size = images // (world * micro_batch_size) * world * micro_batch_size
    return _steps(pairs, tokenizer, 0, range(steps_per_epoch(pairs, batch_size)), rank, world, batch_size,
                  micro_batch_size, image_size, pin_memory, workers, prefetch, crop, max_bad_fraction)  # fmt: skip


def _steps(pairs: Pairs, tokenizer: Tokenizer, seed: int, numbers: Iterable[int], rank: int, world: int,
           batch_size: int, micro_batch_size: int, image_size: int, pin_memory: bool, workers: int, prefetch: int,
           crop: Crop, max_bad_fraction: float) -> Iterator[list[Batch]]:  # fmt: skip
    """Check the arguments, lay the pipeline, and have it stopped when the program ends."""
    if batch_size <= 0 or micro_batch_size <= 0 or batch_size % (world * micro_batch_size):
        share = gcd(batch_size // world, micro_batch_size) if batch_size > 0 and batch_size % world == 0 else 0
        remedy = f"run.micro_batch_size={share} fits" if share > 0 else "change either size"
        raise ValueError(f"data: batch_size must be a multiple of processes * micro_batch_size, got {batch_size=}, "
                         f"{world=}, {micro_batch_size=}; {remedy}")  # fmt: skip
    if workers < 0 or prefetch < 1 or not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"data: it takes workers >= 0, prefetch >= 1 and max_bad_fraction from 0 to 1, "
                         f"got {workers=}, {prefetch=}, {max_bad_fraction=}")  # fmt: skip
    starts = range(rank * micro_batch_size, batch_size, world * micro_batch_size)
    columns = [column for start in starts for column in range(start, start + micro_batch_size)]
    stop = threading.Event()
    epoch_steps = steps_per_epoch(pairs, batch_size)
    places = _places(pairs.image_of, seed, numbers, epoch_steps, batch_size, columns, stop)
    read = in_thread(partial(_read, pairs=pairs, tokenizer=tokenizer, image_size=image_size, crop=crop))
    node = ParallelMapper(IterableWrapper(places), read, workers, method="thread", snapshot_frequency=0)
    node = Batcher(node, micro_batch_size)
    node = ParallelMapper(node, partial(_collate, pad_id=tokenizer.pad_id), num_workers=0)
    if pin_memory:
        node = PinMemory(node, snapshot_frequency=0)
    if workers:
        node = Prefetcher(node, prefetch, snapshot_frequency=0)
    steps = _consume(node, len(starts), max_bad_fraction, stop)
    _running.add(steps)
    return steps


class _Place(NamedTuple):
    """A place in a global batch: a column of row k of an epoch's order."""

    seed: int
    epoch: int
    k: int
    row: NDArray[np.int64]
    column: int


class _Bad(NamedTuple):
    name: str
    cause: str


class _Sample(NamedTuple):
    """What was read for a place: no ids where all that was tried is bad."""

    name: str
    image: Tensor
    ids: list[int]
    bad: list[_Bad]
    label: int | None = None


def _places(groups: NDArray[np.int64], seed: int, numbers: Iterable[int], epoch_steps: int, batch_size: int,
            columns: Sequence[int], stop: threading.Event) -> Iterator[_Place]:  # fmt: skip
    """What this process has to read, step by step, until stop is set."""
    drawn = -1
    for number in numbers:
        epoch, k = divmod(number, epoch_steps)
        if epoch != drawn:
            order, drawn = epoch_order(groups, seed=seed, epoch=epoch, batch_size=batch_size), epoch
        for column in columns:
            if stop.is_set():
                return
            yield _Place(seed, epoch, k, order[k], column)


def _read(place: _Place, pairs: Pairs, tokenizer: Tokenizer, image_size: int, crop: Crop) -> _Sample:
    """Read the sample of a place, or else the first good substitute."""
    bad: list[_Bad] = []
    for i in islice(_candidates(place, pairs.image_of), TRIES):
        name, caption = pairs.ids[i], pairs.captions[i]
        try:
            if not caption.strip():
                raise BadImage("its caption is empty")
            label = int(pairs.labels[i]) if isinstance(pairs, Labelled) else None
            return _Sample(name, pairs.load(i, size=image_size, crop=crop), tokenizer.encode(caption), bad, label)
        except (BadImage, OSError) as error:
            bad.append(_Bad(name, str(error) or type(error).__name__))
    return _Sample("", torch.empty(0), [], bad)


def _candidates(place: _Place, groups: NDArray[np.int64]) -> Iterator[int]:
    """The sample of a place, then others to put there instead: one each of groups that are not in its row.

    All places of a row see the same list of them. Each takes what no other place does, while there is such.
    """
    yield int(place.row[place.column])
    b = len(place.row)
    rng = np.random.Generator(np.random.PCG64(reset_seed(place.seed, place.epoch, place.k)))
    drawn = rng.choice(len(groups), size=min(len(groups), 2 * TRIES * b), replace=False)
    drawn = drawn[~np.isin(groups[drawn], groups[place.row])]
    _, first = np.unique(groups[drawn], return_index=True)
    spare = drawn[np.sort(first)].tolist()
    turn = place.column % max(1, len(spare))
    yield from dict.fromkeys(chain(spare[place.column :: b], spare[turn:], spare[:turn]))


def _collate(samples: list[_Sample], pad_id: int) -> tuple[Batch | None, list[_Bad]]:
    """A micro-batch, and the bad samples that were met; none where a place is empty."""
    bad = [b for sample in samples for b in sample.bad]
    if not all(sample.ids for sample in samples):
        return None, bad
    ids, positions, labels = pack_captions([sample.ids for sample in samples], pad_id=pad_id)
    images = torch.stack([sample.image for sample in samples])  # [b, 3, h, w]
    classes = None if samples[0].label is None else torch.tensor([sample.label for sample in samples])  # [b]
    return Batch(images, ids, positions, labels, [sample.name for sample in samples], len(bad), classes), bad


def _consume(node: BaseNode[tuple[Batch | None, list[_Bad]]], micro_batches: int, max_bad_fraction: float,
             stop: threading.Event) -> Generator[list[Batch], None, None]:  # fmt: skip
    """Gather micro-batches to steps, and watch how many samples are bad. Closing it ends the threads of node."""
    tried = 0
    all_bad: list[_Bad] = []
    step: list[Batch] = []
    try:
        for batch, bad in node:
            for name, cause in bad:
                logger.warning("bad sample %s, replaced: %s", printable(name), printable(cause))
            all_bad += bad
            if batch is None:
                raise ValueError(f"data: no readable sample was found for a place in a batch, among those tried: "
                                 f"{_some(bad)}; check where the data lie, take bad samples out, or lower batch_size "
                                 f"so that there are images to spare")  # fmt: skip
            tried += len(batch.names) + len(bad)
            if tried >= ENOUGH and len(all_bad) > max_bad_fraction * tried:
                raise ValueError(f"data: more than {max_bad_fraction=} of the samples are bad, {len(all_bad)} of "
                                 f"{tried}: {_some(all_bad)}; mend them, or raise max_bad_fraction")  # fmt: skip
            step.append(batch)
            if len(step) == micro_batches:
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
