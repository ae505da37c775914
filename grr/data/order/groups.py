"""Groups of samples of which a batch holds at most one: the captions of an image."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
CHUNK = 2**16  # samples that are compared at a time, so that distinct groups take no memory, not even for a moment


class Groups:
    """The samples of each group, made once for a data set.

    groups: [n], the group of each sample; any integers. Takes no memory if all groups are distinct; otherwise 8 bytes a
    group, unless all have one size, and 8 bytes a sample, unless the samples of each group are consecutive.
    """

    def __init__(self, groups: Ints) -> None:
        self.samples = len(groups)
        self._members: Ints | None = None  # samples, group by group; None: in their own order
        self._starts: Ints | None = None  # [count + 1]; None: all groups have one size
        self.count, ordered = _runs(groups)
        if not ordered:
            self._members = np.argsort(groups, kind="stable")
            groups = groups[self._members]
            self.count, _ = _runs(groups)
        if self.count == self.samples:
            self._members = None  # one order of distinct groups is as good as another
            self._sizes, self._counts = np.ones(1, dtype=np.int64), np.array([self.count])
        else:
            begins = np.ones(self.samples, dtype=bool)  # whether a sample is the first of its group
            np.not_equal(groups[1:], groups[:-1], out=begins[1:])
            starts = np.append(np.flatnonzero(begins), self.samples)
            self._sizes, self._counts = np.unique(np.diff(starts), return_counts=True)  # how often each size occurs
            self._starts = starts if len(self._sizes) > 1 else None
        self.largest, self.equal = int(self._sizes[-1]), self._starts is None

    def num_batches(self, batch_size: int) -> int:
        """Returns the largest possible number of batches of batch_size samples without two of a group in a batch.

        k batches can hold k samples of a group, so it is the largest k with sum(min(size of a group, k)) >= k *
        batch_size; `Epochs` reaches it. It is n // batch_size if no group is larger than that. Raises ValueError if
        there are fewer groups than batch_size.
        """
        if not 1 <= batch_size <= self.count:
            raise ValueError(
                "epoch_order: a batch holds each image at most once, so batch_size must be at least 1 and at most the "
                f"number of images, got {batch_size=} for {self.count} images; lower batch_size or add images"
            )
        low, high = 1, self.samples // batch_size
        while low < high:
            middle = (low + high + 1) // 2
            fits = int((np.minimum(self._sizes, middle) * self._counts).sum()) >= middle * batch_size
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def sizes(self, groups: Ints) -> Ints:
        """Returns the numbers of samples of some groups, which are numbered from 0 in the order of their names."""
        if self._starts is None:
            return np.full(groups.shape, self.largest)
        return self._starts[groups + 1] - self._starts[groups]

    def sample(self, groups: Ints, numbers: Ints) -> Ints:
        """Returns the sample with a number, from 0 on, in each of some groups."""
        places = (groups * self.largest if self._starts is None else self._starts[groups]) + numbers
        return places if self._members is None else self._members[places]


def num_batches(groups: Ints, *, batch_size: int) -> int:
    """Returns the number of batches of an epoch; groups: [n]. See `Groups.num_batches`, which also names the errors."""
    return Groups(groups).num_batches(batch_size)


def _runs(groups: Ints) -> tuple[int, bool]:
    """Returns the number of runs of neighbours of one group, and whether the groups [n] are in order."""
    count, ordered = min(1, len(groups)), True
    for start in range(0, len(groups), CHUNK):
        part = groups[max(0, start - 1) : start + CHUNK]
        count += int(np.count_nonzero(part[1:] != part[:-1]))
        ordered = ordered and bool((part[1:] >= part[:-1]).all())
    return count, ordered
