"""Batches of an epoch: pure functions of the seed, the epoch and the batch, none of which needs the others."""

from dataclasses import dataclass

import numpy as np

from grr.data.order.groups import Groups, Ints
from grr.data.order.permutation import Numbers, mix, permute, scale, scramble, unpermute

CHUNK = 2**16  # numbers that are computed at a time
SPAN = 8  # groups of unequal sizes between two that have a stored place


class Epochs:
    """The batches of the epochs of a data set: `batch(epoch, k)` for k below `num_batches`.

    A batch holds distinct samples, and no two of a group. A sample is equally likely in any batch of an epoch. The
    samples beyond `num_batches` full batches are left out, different ones in each epoch. Raises ValueError if there are
    fewer groups than batch_size.

    The groups are permuted, their samples concatenated and cut into batch_size strips of num_batches samples; a batch
    takes one sample of each strip. Each strip has a permutation of its own, so the samples of a group in one strip go
    to different batches. Only a group that two strips share needs a correction. As the permutations are computed
    element by element, a batch takes the time of its own samples. A correction, and the places of groups of unequal
    sizes, are computed once an epoch and kept for the last one.
    """

    def __init__(self, groups: Groups, *, seed: int, batch_size: int) -> None:
        self.groups, self.seed, self.batch_size = groups, seed, batch_size
        self.num_batches = groups.num_batches(batch_size)
        self._epoch: _Epoch | None = None

    def batch(self, epoch: int, k: int) -> Ints:
        """Returns the samples of batch k of an epoch: [batch_size]."""
        return self.batches(epoch, k, k + 1)[0]

    def batches(self, epoch: int, start: int = 0, stop: int | None = None) -> Ints:
        """Returns the samples of the batches from start to stop, by default all: [stop - start, batch_size]."""
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = _Epoch(self.groups, self.seed, epoch, self.num_batches, self.batch_size)
        stop = self.num_batches if stop is None else min(stop, self.num_batches)
        result = np.empty((max(0, stop - start), self.batch_size), dtype=np.int64)
        step = max(1, CHUNK // self.batch_size)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            result[first - start : last - start] = self._epoch.samples(self._epoch.places(np.arange(first, last)))
        return result


def epoch_order(groups: Ints, *, seed: int, epoch: int, batch_size: int) -> Ints:
    """Returns the batches of an epoch: distinct sample numbers [num_batches, batch_size], a row without two of a group.

    groups: [n], the group of each sample. The result is the same on every machine and with every version of numpy. See
    `Epochs`, which returns single batches, for its distribution and the error.
    """
    return Epochs(Groups(groups), seed=seed, batch_size=batch_size).batches(epoch)


@dataclass(frozen=True)
class _Shared:
    """Group that two strips share: its samples are the last `before` of a strip and the first `after` of the next."""

    strip: int  # the second one
    before: int
    after: int


class _Epoch:
    """One epoch. A place is a number below rows * columns in the concatenated samples."""

    def __init__(self, groups: Groups, seed: int, number: int, rows: int, columns: int) -> None:
        self.groups, self.number, self.rows, self.columns = groups, number, rows, columns
        self.group_key, self.sample_key = mix(seed, number, 0), mix(seed, number, 1)
        self.strip_keys = scramble(np.arange(columns, dtype=np.uint64) + mix(seed, number, 2))
        self.swap_keys = scramble(np.arange(columns, dtype=np.uint64) + mix(seed, number, 3))
        self.ends = None if groups.equal else self._span_ends()
        self.corrected: dict[int, Ints] = {}  # strip -> the number in it of the sample of each row: [rows]
        if groups.largest > 1 and rows > 1:
            self._correct()

    def places(self, rows: Ints) -> Ints:
        """Returns the places of the samples of some batches: [m] -> [m, columns]."""
        numbers = permute(rows[:, None], self.rows, self.strip_keys).astype(np.int64)  # [m, columns]
        for strip, order in self.corrected.items():
            numbers[:, strip] = order[rows]
        return np.arange(self.columns) * self.rows + numbers

    def samples(self, places: Ints) -> Ints:
        """Returns the samples at some places, of the same shape."""
        rank, number = self._locate(places)
        groups = self._group(rank)
        if self.groups.largest == 1:
            return self.groups.sample(groups, number)
        sizes = self.groups.sizes(groups)
        turns = scale(scramble(groups.astype(np.uint64) + self.sample_key), sizes).astype(np.int64)
        return self.groups.sample(groups, (number + turns) % sizes)

    def _group(self, ranks: Ints) -> Ints:
        """Returns the groups that are at some ranks of the permuted groups."""
        return permute(ranks, self.groups.count, self.group_key).astype(np.int64)

    def _kept(self, ranks: Ints) -> Ints:
        """Returns how many samples the groups at some ranks have in this epoch: at most one for each batch."""
        return np.minimum(self.groups.sizes(self._group(ranks)), self.rows)

    def _span_ends(self) -> Ints:
        """Returns the place after every SPAN groups: [number of groups / SPAN]."""
        sums = []
        for start in range(0, self.groups.count, CHUNK):
            kept = self._kept(np.arange(start, min(start + CHUNK, self.groups.count)))
            sums.append(np.add.reduceat(kept, np.arange(0, len(kept), SPAN)))
        return np.cumsum(np.concatenate(sums))

    def _locate(self, places: Ints) -> tuple[Ints, Ints]:
        """Returns the rank of the group at each place, and the number of the place in that group."""
        if self.ends is None:
            return np.divmod(places, min(self.groups.largest, self.rows))
        spans = np.unique(np.searchsorted(self.ends, places, side="right"))
        ranks = spans[:, None] * SPAN + np.arange(SPAN)  # [spans, SPAN]
        kept = self._kept(np.minimum(ranks, self.groups.count - 1))
        kept[ranks >= self.groups.count] = 0
        starts = np.where(spans, self.ends[spans - 1], 0)[:, None] + kept.cumsum(axis=1) - kept
        index = np.searchsorted(starts.ravel(), places, side="right") - 1
        return ranks.ravel()[index], places - starts.ravel()[index]

    def _correct(self) -> None:
        """Swap samples of groups that two strips share, in the second strip, out of batches that hold them already."""
        for shared in self._shared():
            if shared.strip - 1 not in self.corrected and not self._clashes(shared):
                continue
            strip, before = self._strip(shared.strip), self._strip(shared.strip - 1) >= self.rows - shared.before
            in_group = strip < shared.after
            clashes, free = np.flatnonzero(in_group & before), np.flatnonzero(~in_group & ~before)
            if not len(clashes):
                continue
            drawn = permute(np.arange(len(clashes)), len(free), self.swap_keys[shared.strip]).astype(np.int64)
            chosen = free[drawn]
            strip[clashes], strip[chosen] = strip[chosen], strip[clashes]
            self.corrected[shared.strip] = strip

    def _shared(self) -> list[_Shared]:
        strips = np.arange(1, self.columns)
        rank, number = self._locate(strips * self.rows)
        kept = self._kept(rank)
        return [
            _Shared(strip, before, after)
            for strip, before, after in zip(
                strips.tolist(), number.tolist(), np.minimum(kept - number, self.rows).tolist(), strict=True
            )
            if before
        ]

    def _clashes(self, shared: _Shared) -> bool:
        """Returns whether a batch takes samples of the shared group from both strips, as they are permuted."""
        before = self._rows_of(shared.strip - 1, np.arange(self.rows - shared.before, self.rows))
        return bool(np.isin(self._rows_of(shared.strip, np.arange(shared.after)), before).any())

    def _rows_of(self, strip: int, numbers: Ints) -> Numbers:
        return unpermute(numbers, self.rows, self.strip_keys[strip])

    def _strip(self, strip: int) -> Ints:
        """Returns the number in a strip of the sample of each row: [rows]."""
        if strip in self.corrected:
            return self.corrected[strip]
        return permute(np.arange(self.rows), self.rows, self.strip_keys[strip]).astype(np.int64)
