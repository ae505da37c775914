"""InMemory reads each image once and returns the images of the data."""

import numpy as np
import pytest
import torch

from grr.data.images import BadImage
from grr.data.memory import InMemory
from grr.data.pairs import Pairs, Texts


class Counted(Pairs):
    """Two captions of each of three images, the second of which is bad; `reads` lists the calls of load."""

    def __init__(self) -> None:
        names = [f"{i}" for i in range(6)]
        super().__init__(Texts.of(names), Texts.of(names), np.arange(6) // 2)
        self.reads: list[int] = []

    def load(self, i, *, size, crop):
        self.reads.append(i)
        if i // 2 == 1:
            raise BadImage("not an image")
        return torch.full((3, size, size), i // 2, dtype=torch.uint8)


def test_an_image_is_read_once_for_all_its_captions_and_once_for_each_size():
    data = Counted()
    kept = InMemory(data)
    assert (kept.fingerprint, list(kept.captions)) == (data.fingerprint, list(data.captions))
    for i in (0, 1, 4, 5, 0):
        assert torch.equal(kept.load(i, size=8, crop="squash"), torch.full((3, 8, 8), i // 2, dtype=torch.uint8))
    assert data.reads == [0, 4]
    assert kept.load(1, size=4, crop="squash").shape == (3, 4, 4)
    kept.load(1, size=4, crop="center")
    assert data.reads == [0, 4, 1, 1]


def test_a_bad_image_is_read_once_and_reported_every_time():
    kept = InMemory(Counted())
    for _ in range(2):
        with pytest.raises(BadImage):
            kept.load(2, size=8, crop="squash")
