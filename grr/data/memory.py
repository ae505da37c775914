"""Cache of decoded images, for data that fit into memory and are read many times."""

from torch import Tensor

from grr.data.images import THUMBNAIL, Crop
from grr.data.pairs import Pairs


class InMemory(Pairs):
    """Pairs whose images are decoded once and kept in memory, size x size x 3 bytes each.

    Pictures that an epoch of training has for itself are not kept.
    Four thousand images of 144 pixels take 250 MB in each process.
    """

    def __init__(self, pairs: Pairs) -> None:
        super().__init__(pairs.ids, pairs.captions, pairs.image_of)
        self.pairs, self.records = pairs, pairs.records
        self._images: dict[tuple[int, int, Crop], Tensor] = {}

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        key = int(self.image_of[i]), size, crop
        if key not in self._images:
            self._images[key] = self.pairs.load(i, size=size, crop=crop)
        return self._images[key]

    def for_epoch(self, seed: int, epoch: int) -> Pairs:
        pairs = self.pairs.for_epoch(seed, epoch)
        return self if pairs is self.pairs else pairs

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return self.pairs.thumbnail(i, side=side)
