"""Augmentation of training images: random crops, mirror images and colours, fixed by seed, epoch and pair."""

import math
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grr.data.images import THUMBNAIL, Crop
from grr.data.labelled import Labelled
from grr.data.pairs import Pairs
from grr.seeds import derive_seed

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in the brightness of a colour (ITU-R BT.601)
ASPECT = 4 / 3  # the largest ratio of the sides of a crop, and the inverse of the smallest


def augmented(pairs: Pairs, *, crop_area: float = 1.0, flip: float = 0.0, color_jitter: float = 0.0) -> Pairs:
    """Returns pairs whose images training reads with random changes; validation reads them as they are.

    crop_area: the least fraction of the area that a random crop keeps; the crop, of a random size, shape and place, is
    resized to the size of the model (Szegedy et al. 2015, section 6). flip: the probability of a mirror image, which
    makes captions with "left" and "right" wrong. color_jitter: brightness, contrast and saturation are multiplied by
    numbers from 1 - color_jitter to 1 + color_jitter. The changes of a pair depend on the seed of the run, the epoch
    and the pair alone, so a resumed run draws the same. Returns `pairs` itself if all three are off.
    Raises ValueError if crop_area is not above 0 and at most 1, or another argument is not from 0 to 1.
    """
    if not 0 < crop_area <= 1 or not 0 <= flip <= 1 or not 0 <= color_jitter <= 1:
        raise ValueError(
            "augmented: crop_area must be above 0 and at most 1, flip and color_jitter from 0 to 1, got "
            f"{crop_area=}, {flip=}, {color_jitter=}"
        )
    if crop_area == 1 and not flip and not color_jitter:
        return pairs
    if isinstance(pairs, Labelled):
        changed = Augmented(pairs.pairs, crop_area, flip, color_jitter)
        return Labelled(changed, pairs.classes, pairs.labels, pairs.people)
    return Augmented(pairs, crop_area, flip, color_jitter)


class Augmented(Pairs):
    """Pairs that an epoch of training reads with random changes. See `augmented`."""

    def __init__(self, pairs: Pairs, crop_area: float, flip: float, color_jitter: float) -> None:
        super().__init__(pairs.ids, pairs.captions, pairs.image_of)
        self.pairs, self.records = pairs, pairs.records
        self.crop_area, self.flip, self.color_jitter = crop_area, flip, color_jitter

    @cached_property
    def fingerprint(self) -> str:
        """A hash of ids and captions in their order; the arguments of `augmented` are not part of it."""
        return self.pairs.fingerprint

    def for_epoch(self, seed: int, epoch: int) -> "AugmentedEpoch":
        return AugmentedEpoch(self, seed, epoch)

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return self.pairs.load(i, size=size, crop=crop)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return self.pairs.thumbnail(i, side=side)


class AugmentedEpoch(Pairs):
    """Pairs with the random changes of one epoch of a run."""

    def __init__(self, source: Augmented, seed: int, epoch: int) -> None:
        super().__init__(source.ids, source.captions, source.image_of)
        self.source, self.seed, self.epoch = source, seed, epoch
        self.pairs = source.pairs.for_epoch(seed, epoch)

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        source = self.source
        rng = np.random.Generator(np.random.PCG64(derive_seed(self.seed, self.epoch, i)))
        larger = math.ceil(size / math.sqrt(source.crop_area))  # so that the smallest crop has as many pixels
        image = self.pairs.load(i, size=larger, crop=crop)
        if source.crop_area < 1:
            image = random_resized_crop(image, size, source.crop_area, rng)
        if rng.random() < source.flip:
            image = image.flip(-1)
        return jitter(image, source.color_jitter, rng) if source.color_jitter else image


def random_resized_crop(image: Tensor, size: int, least_area: float, rng: np.random.Generator) -> Tensor:
    """Cut a random box out of a square image and resize it: uint8 [3, h, h] -> [3, size, size].

    The area is uniform from least_area to 1 of the image's, the logarithm of the ratio of the sides uniform where the
    box fits into the image, at most from 3/4 to 4/3.
    """
    h = image.shape[-1]
    area = rng.uniform(least_area, 1)
    widest = math.log(min(ASPECT, 1 / area))  # a box of this area and a larger ratio does not fit
    ratio = math.exp(rng.uniform(-widest, widest))
    height, width = (max(1, min(h, round(h * math.sqrt(part)))) for part in (area / ratio, area * ratio))
    top, left = (int(rng.integers(h - side + 1)) for side in (height, width))
    box = image[None, :, top : top + height, left : left + width]
    return F.interpolate(box, (size, size), mode="bilinear", antialias=True)[0]


def jitter(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Multiply brightness, contrast and saturation by random numbers: uint8 [3, h, w] -> [3, h, w]."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3).tolist()
    x = image.float() * brightness
    luma = torch.tensor(LUMA).view(3, 1, 1)
    x = (x - (mean := (x * luma).sum(0).mean())) * contrast + mean
    gray = (x * luma).sum(0, keepdim=True)  # [1, h, w]
    return ((x - gray) * saturation + gray).round().clamp(0, 255).byte()
