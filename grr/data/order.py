"""Order of an epoch: a pure function of the seed, whose batches never hold two captions of one image."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def num_batches(groups: Ints, *, batch_size: int) -> int:
    """Returns the largest possible number of batches of batch_size samples without two samples of a group in a batch.

    groups: [n], the group of each sample. k batches can hold k samples of a group, so it is the largest k with
    sum(min(size of a group, k)) >= k * batch_size; `epoch_order` reaches it. It is n // batch_size if no group is
    larger than that. Raises ValueError if there are fewer groups than batch_size.
    """
    sizes = np.unique(groups, return_counts=True)[1]
    if not 1 <= batch_size <= len(sizes):
        raise ValueError(
            "epoch_order: a batch holds each image at most once, so batch_size must be at least 1 and at most the "
            f"number of images, got {batch_size=} for {len(sizes)} images; lower batch_size or add images"
        )
    low, high = 1, len(groups) // batch_size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() >= middle * batch_size else (low, middle - 1)
    return low


def check_negatives(batch_size: int, micro_batch_size: int | None, negatives: Literal["global", "local"]) -> None:
    """Raise ValueError if pairs have no negatives, because the contrastive loss would be a constant 0.

    Negatives are the other pairs of the global batch, or with "local" those of the micro-batch, whose size then must
    not be None, which leaves it to the memory of the device.
    """
    if micro_batch_size is None and negatives == "local":
        raise ValueError(
            "contrastive loss: with loss.negatives=local the size of a micro-batch decides the loss, so "
            "run.micro_batch_size must be a number, got null; set run.micro_batch_size"
        )
    name, size = ("batch_size", batch_size) if negatives == "global" else ("micro_batch_size", micro_batch_size)
    if size is not None and size < 2:
        raise ValueError(
            f"contrastive loss: a pair needs a negative, so run.{name} must be at least 2 with "
            f"loss.negatives={negatives}, got {size}; raise run.{name}"
        )


def epoch_order(groups: Ints, *, seed: int, epoch: int, batch_size: int) -> Ints:
    """Returns the batches of an epoch: distinct sample numbers [num_batches, batch_size], a row without two of a group.

    groups: [n], the group of each sample. A sample is equally likely in any batch. The samples beyond `num_batches`
    full batches are left out, different ones in each epoch. The result is the same on every machine and with every
    version of numpy. Raises ValueError if there are fewer groups than batch_size.

    The samples are concatenated group by group and cut into batch_size strips of num_batches samples; a batch takes one
    sample of each strip. Each strip is shuffled independently, so the samples of a group in one strip go to different
    batches. Only a group that two strips share needs a correction.
    """
    rows = num_batches(groups, batch_size=batch_size)
    order = _shuffled(len(groups), mix(seed, epoch, 0))
    order = order[_by_group(groups[order], rows, mix(seed, epoch, 1))][: rows * batch_size]
    strips = order.reshape(batch_size, rows)
    strips = np.take_along_axis(strips, _shuffled(strips.shape, mix(seed, epoch, 2)), axis=1)
    cut = np.flatnonzero(groups[order[rows - 1 : -1 : rows]] == groups[order[rows::rows]]) + 1
    for i in cut.tolist():
        _separate(strips[i], groups[strips[i]], groups[strips[i - 1]], groups[order[i * rows]], mix(seed, epoch, 3, i))
    return np.ascontiguousarray(strips.T)


def mix(*numbers: int) -> int:
    """Returns a 64-bit hash of some integers."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = scramble(state + np.uint64(number & 0xFFFFFFFFFFFFFFFF))
    return int(state[0])


def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Map 64-bit numbers to pseudo-random ones, one to one (SplitMix64: Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(shape: int | tuple[int, int], key: int) -> Ints:
    """Returns a pseudo-random permutation of the indices of the last axis, another for each row."""
    hashes = scramble(np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(key)).reshape(shape)
    count = hashes.shape[-1]
    low = np.uint64((1 << count.bit_length()) - 1)
    numbers = (hashes & ~low) | np.arange(count, dtype=np.uint64)  # high bits of the hash, then the index: distinct
    numbers.sort(axis=-1)
    return (numbers & low).astype(np.int64)


def _by_group(groups: Ints, most: int, key: int) -> Ints:
    """Returns the indices of samples, group by group in random order, the first `most` of each group: at most [n]."""
    _, code, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), dtype=np.int64)  # of each group in the random order
    rank[_shuffled(len(sizes), key)] = np.arange(len(sizes))
    bits = len(groups).bit_length()
    numbers = (rank[code] << bits) | np.arange(len(groups))
    numbers.sort()
    order = numbers & ((1 << bits) - 1)
    if sizes.max() <= most:
        return order
    rank_of = numbers >> bits
    start = np.flatnonzero(np.diff(rank_of, prepend=-1))
    return order[np.arange(len(order)) - start[rank_of] < most]


def _separate(strip: Ints, groups: Ints, before: Ints, group: np.int64, key: int) -> None:
    """Swap samples of a group that two strips share, in the second strip, out of batches that hold the group already.

    strip, groups: samples of the second strip and their groups [rows]; before: the groups of the first strip [rows].
    """
    in_group = groups == group
    clashes = np.flatnonzero(in_group & (before == group))
    free = np.flatnonzero(~in_group & (before != group))
    chosen = free[_shuffled(len(free), key)[: len(clashes)]]
    strip[clashes], strip[chosen] = strip[chosen], strip[clashes]
