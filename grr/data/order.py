"""The order of an epoch: a pure function, in which no batch holds two captions of one image."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def num_batches(groups: Ints, *, batch_size: int) -> int:
    """The most batches of batch_size samples, no two of one group, that any arrangement of the samples has.

    groups: [n], the group of each sample. k batches can hold k samples of a group, so it is the largest k with
    sum(min(size of a group, k)) >= k * batch_size; `epoch_order` reaches it. n // batch_size if groups are no larger
    than that. Raises ValueError if there are fewer groups than batch_size.
    """
    sizes = np.unique(groups, return_counts=True)[1]
    if not 1 <= batch_size <= len(sizes):
        raise ValueError(
            f"epoch_order: a batch holds no image twice, so batch_size must be at least 1 and at most the number of "
            f"images, got {batch_size=} for {len(sizes)} images; make batch_size smaller or add images"
        )
    low, high = 1, len(groups) // batch_size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() >= middle * batch_size else (low, middle - 1)
    return low


def check_negatives(batch_size: int, micro_batch_size: int, negatives: Literal["global", "local"]) -> None:
    """Check that every pair has another one to be contrasted with: without, the contrastive loss is a constant 0.

    Negatives are the other pairs of the global batch, or with "local" those of the micro-batch. Raises ValueError.
    """
    name, size = ("batch_size", batch_size) if negatives == "global" else ("micro_batch_size", micro_batch_size)
    if size < 2:
        raise ValueError(
            f"contrastive loss: a pair needs another one to be told from, so run.{name} must be at least 2 with "
            f"loss.negatives={negatives}, got {size}; raise run.{name}"
        )


def epoch_order(groups: Ints, *, seed: int, epoch: int, batch_size: int) -> Ints:
    """All batches of an epoch: sample numbers [num_batches, batch_size], none twice, no two of one group in a row.

    groups: [n], the group of each sample. A sample is equally likely in any batch. What does not fill a batch, by
    `num_batches`, is left out, other samples in each epoch. The same on every machine and with every version of numpy.
    Raises ValueError if there are fewer groups than batch_size.

    Samples are laid side by side, group by group, and cut into batch_size strips as long as there are batches; a batch
    takes one sample of each strip. Strips are shuffled each by itself, so the samples of a group, in one strip, go to
    different batches. Only a group that is cut needs a second look.
    """
    rows = num_batches(groups, batch_size=batch_size)
    order = _shuffled(len(groups), mix(seed, epoch, 0))
    order = order[_by_group(groups[order], rows, mix(seed, epoch, 1))][: rows * batch_size]
    strips = order.reshape(batch_size, rows)
    strips = np.take_along_axis(strips, _shuffled(strips.shape, mix(seed, epoch, 2)), axis=1)
    cut = np.flatnonzero(groups[order[rows - 1 : -1 : rows]] == groups[order[rows::rows]]) + 1
    for i in cut.tolist():
        _mend(strips[i], groups[strips[i]], groups[strips[i - 1]], groups[order[i * rows]], mix(seed, epoch, 3, i))
    return np.ascontiguousarray(strips.T)


def mix(*numbers: int) -> int:
    """A 64-bit hash of some integers."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = scramble(state + np.uint64(number & 0xFFFFFFFFFFFFFFFF))
    return int(state[0])


def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A random-looking bijection of 64-bit numbers (SplitMix64: Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(shape: int | tuple[int, int], key: int) -> Ints:
    """A permutation of the numbers of the last axis, for each row its own."""
    hashes = scramble(np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(key)).reshape(shape)
    count = hashes.shape[-1]
    low = np.uint64((1 << count.bit_length()) - 1)
    numbers = (hashes & ~low) | np.arange(count, dtype=np.uint64)  # the hash above, the number below: all different
    numbers.sort(axis=-1)
    return (numbers & low).astype(np.int64)


def _by_group(groups: Ints, most: int, key: int) -> Ints:
    """Where samples stand, group by group, groups in random order, the first `most` of each: at most [n]."""
    _, code, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    turn = np.empty(len(sizes), dtype=np.int64)
    turn[_shuffled(len(sizes), key)] = np.arange(len(sizes))
    bits = len(groups).bit_length()
    numbers = (turn[code] << bits) | np.arange(len(groups))
    numbers.sort()
    order = numbers & ((1 << bits) - 1)
    if sizes.max() <= most:
        return order
    of_turn = numbers >> bits
    start = np.flatnonzero(np.diff(of_turn, prepend=-1))
    return order[np.arange(len(order)) - start[of_turn] < most]


def _mend(strip: Ints, groups: Ints, before: Ints, group: np.int64, key: int) -> None:
    """Move the samples of a group that is cut, in its second strip, away from the batches that hold its others.

    strip, groups: samples and their groups [rows]; before: the groups of the strip before [rows].
    """
    here = groups == group
    clashes = np.flatnonzero(here & (before == group))
    free = np.flatnonzero(~here & (before != group))
    chosen = free[_shuffled(len(free), key)[: len(clashes)]]
    strip[clashes], strip[chosen] = strip[chosen], strip[clashes]
