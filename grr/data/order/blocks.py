"""Order for disks that are slow to seek: blocks of neighbouring samples in random order, shuffled in windows."""

import numpy as np

from grr.data.order.epochs import Epochs
from grr.data.order.groups import Groups, Ints
from grr.data.order.permutation import mix, permute, unpermute

WINDOW = 16  # blocks


class BlockEpochs(Epochs):
    """Batches of which those of a window hold samples of WINDOW blocks or one more.

    groups: [n], the group of each sample; block: neighbouring samples in a block. The blocks of an epoch are permuted
    and concatenated, beginning at a random sample, and cut into windows of as many whole batches as WINDOW blocks have;
    the last window has up to twice as many. The batches of a window are those of `Epochs`, of its samples alone. So a
    sample is equally likely in any batch, as in `Epochs`, but it meets the samples of its own block more often than
    others. A window takes 24 bytes a sample of it.

    Raises ValueError if a group has more samples than a window has batches, and as `Epochs` does.
    """

    def __init__(self, groups: Ints, *, seed: int, batch_size: int, block: int) -> None:
        super().__init__(Groups(groups), seed=seed, batch_size=batch_size)
        self.group_of, self.block = groups, block
        self.window = max(1, WINDOW * block // batch_size)  # batches
        self._window: tuple[int, int, Ints, Epochs] | None = None
        if self.num_batches < 2 * self.window:
            self.window = self.num_batches
        elif self.groups.largest > self.window:
            raise ValueError(
                f"data: with loader.block={block} an image may have at most as many captions as {WINDOW} blocks have "
                f"batches, {self.window}, got {self.groups.largest}; raise loader.block, or set it to null"
            )

    def batches(self, epoch: int, start: int = 0, stop: int | None = None) -> Ints:
        """Returns the samples of the batches from start to stop, by default all: [stop - start, batch_size]."""
        if self.window == self.num_batches:  # one window
            return super().batches(epoch, start, stop)
        rows = range(self.num_batches)[start:stop]
        return np.array([self._batch(epoch, k) for k in rows], dtype=np.int64).reshape(len(rows), self.batch_size)

    def _batch(self, epoch: int, k: int) -> Ints:
        number = min(k // self.window, self.num_batches // self.window - 1)
        if self._window is None or self._window[:2] != (epoch, number):
            last = number == self.num_batches // self.window - 1
            stop = self.num_batches if last else (number + 1) * self.window
            samples = self._samples(epoch, np.arange(number * self.window * self.batch_size, stop * self.batch_size))
            seed = int(mix(self.seed, epoch, 1, number))
            epochs = Epochs(Groups(self.group_of[samples]), seed=seed, batch_size=self.batch_size)
            self._window = epoch, number, samples, epochs
        _, _, samples, epochs = self._window
        return samples[epochs.batch(0, k - number * self.window)]

    def _samples(self, epoch: int, places: Ints) -> Ints:
        """Returns the samples at some places of the permuted and concatenated blocks."""
        n, block = self.groups.samples, self.block
        count = -(-n // block)
        key, missing = mix(self.seed, epoch, 2), count * block - n  # samples that the last block has less than others
        places = (places + int(mix(self.seed, epoch, 3)) % n) % n
        end = (int(unpermute(np.array([count - 1]), count, key)[0]) + 1) * block - missing  # of the last block
        places = np.where(places >= end, places + missing, places)
        return permute(places // block, count, key).astype(np.int64) * block + places % block


def block_epochs(groups: Groups, group_of: Ints, *, seed: int, batch_size: int, block: int | None) -> Epochs:
    """Returns `BlockEpochs`, or `Epochs` if block is None. Raises ValueError as these do, and if block is not
    positive."""
    if block is None:
        return Epochs(groups, seed=seed, batch_size=batch_size)
    if block < 1:
        raise ValueError(f"data: loader.block must be at least 1 sample, or null, got {block}; a shard has thousands")
    return BlockEpochs(group_of, seed=seed, batch_size=batch_size, block=block)
