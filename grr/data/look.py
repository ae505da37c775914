"""A look at data before hours are spent on them: how much there is, what comes first, what is odd, what is wrong."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from grr.data.labelled import Labelled
from grr.data.pairs import ImageFiles, Ints, Pairs, place
from grr.data.shards import TarShards
from grr.images import SUFFIXES, Crop
from grr.packing import IGNORE
from grr.pictures import batches, read_batches
from grr.tokenizer import Tokenizer

IMAGES = 500  # looked at in each data set, unless all are
CAPTIONS = 20_000  # whose tokens are counted, unless all are
SHOWN = 3  # samples, and names of what is wrong


class Finding(NamedTuple):
    """A line of a check: what was looked at, what was seen there, names that show it."""

    what: str
    said: str
    wrong: bool = False
    shown: Sequence[str] = ()


class Data:
    """Pairs under the name of their section, and what is worked out of them once: hashes of 8 bytes each."""

    def __init__(self, name: str, pairs: Pairs) -> None:
        self.name, self.pairs = name, pairs
        self.source = pairs.pairs if isinstance(pairs, Labelled) else pairs
        _, self.first = np.unique(pairs.image_of, return_index=True)  # [images] a pair of each

    @cached_property
    def images(self) -> NDArray[np.uint64]:
        """[images] of the place where each image lies."""
        return _hashes(_location(self.source, i) for i in self.first.tolist())

    @cached_property
    def captions(self) -> NDArray[np.uint64]:
        """[n] of each caption."""
        return _hashes(self.pairs.captions)

    def shown(self, rows: Ints | range) -> list[str]:
        """The first of some pairs, for a person."""
        return [f"{self.pairs.ids[i]}  {self.pairs.captions[i]!r}{self._class(int(i))}" for i in rows[:SHOWN]]

    def _class(self, i: int) -> str:
        if isinstance(self.pairs, Labelled) and self.pairs.labels[i] != IGNORE:
            return f" -> {self.pairs.classes[self.pairs.labels[i]]}"
        return ""


def amounts(data: Data) -> Iterator[Finding]:
    """How many there are, and the first of them."""
    pairs, n, images = data.pairs, len(data.pairs), len(data.first)
    yield Finding("pairs", f"{n:,} of {images:,} images" + ("" if n == images else f", {n / images:.1f} each"))
    if isinstance(pairs, Labelled):
        counts = np.bincount(pairs.labels[pairs.labels != IGNORE], minlength=len(pairs.classes))
        none = int((pairs.labels == IGNORE).sum())
        said = f"{len(counts):,}, of {counts.min():,} to {counts.max():,} pairs"
        yield Finding("classes", said + (f"; {none:,} of {n:,} pairs in none" if none else ""))
    first, *others = data.shown(range(n))
    yield Finding("first", first, shown=others)


def texts(data: Data) -> Iterator[Finding]:
    """Captions that are empty, pairs that stand there twice, captions that several images share."""
    pairs, captions = data.pairs, data.captions
    lengths = pairs.captions.ends - pairs.captions.starts
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        said = f"{len(empty):,} of {len(pairs):,} captions; write them, or take the pairs out"
        yield Finding("empty", said, wrong=True, shown=data.shown(empty))
    order = np.lexsort((captions, pairs.image_of))
    again = (np.diff(captions[order]) == 0) & (np.diff(pairs.image_of[order]) == 0)
    if again.any():
        said = f"{int(again.sum()):,} of {len(pairs):,} pairs, with the image and the caption of another"
        yield Finding("duplicates", said, shown=data.shown(order[1:][again]))
    if isinstance(pairs, Labelled):
        return  # one question to many images is no fault
    once = np.concatenate((order[:1], order[1:][~again]))
    once = np.sort(once[lengths[once] > 0])
    _, first, counts = np.unique(captions[once], return_index=True, return_counts=True)
    several = np.flatnonzero(counts > 1)
    if len(several):
        worst = several[np.argsort(-counts[several], kind="stable")][:SHOWN]
        said = f"{len(several):,} of {len(counts):,} captions, each of several images, which it cannot tell apart"
        shown = [f"{counts[j]:,} images: {pairs.captions[once[first[j]]]!r}" for j in worst]
        yield Finding("alike", said, shown=shown)


def lengths(data: Data, tokenizer: Tokenizer, context: int, *, every: bool) -> Finding:
    """How many tokens captions have, and how many captions are cut by a model that reads `context` tokens.

    tokenizer: one that reads more, so that what would be cut can be counted.
    """
    captions, room, most = data.pairs.captions, context - 3, tokenizer.context - 3  # without BOS, EOS and CLS
    rows = range(len(captions)) if every else some(len(captions), CAPTIONS)
    tokens = np.array([sum(i != tokenizer.pad_id for i in tokenizer.encode(captions[i])) - 3 for i in rows])
    cut = int((tokens > room).sum())
    longest = f"{tokens.max()}{' or more' if tokens.max() == most else ''}"
    tail = f"{cut:,} ({cut / len(tokens):.1%}) are cut to {room}" if cut else f"none is cut, there is room for {room}"
    said = f"{tokens.min()} to {longest} tokens, half of them at most {int(np.median(tokens))}; {tail}"
    return Finding("captions", f"{said}{_of(len(tokens), len(captions))}")


def pictures(data: Data, *, size: int, crop: Crop, every: bool) -> tuple[set[bytes], list[Finding]]:
    """Read images as a run does: a hash of each one's pixels, and those that cannot be read or are equal to another."""
    pairs, n = data.pairs, len(data.first)
    rows = data.first[range(n) if every else some(n, IMAGES)].tolist()
    bad, seen, same = dict[int, str](), dict[bytes, int](), list[str]()
    with tqdm(total=len(rows), desc=f"{data.name}: images", unit="image", delay=2, leave=False) as bar:
        for batch in read_batches(lambda i: pairs.load(i, size=size, crop=crop), batches(rows, 64)):
            bad |= batch.bad
            for i, pixels in zip(batch.good, () if batch.pixels is None else batch.pixels, strict=True):
                other = seen.setdefault(_digest(pixels), i)
                if other != i:
                    same.append(f"{pairs.ids[i]} and {pairs.ids[other]}")
            bar.update(len(batch.good) + len(batch.bad))
    where = _of(len(rows), n)
    names = [f"{pairs.ids[i]}: {why}" for i, why in bad.items()]
    said = f"{f'{len(bad):,}' if bad else 'none'} of {len(rows):,} images{where}"
    findings = [Finding("unreadable", said, wrong=bool(bad), shown=names if every else names[:SHOWN])]
    if same:
        said = f"{len(same):,} of {len(rows):,} images, with the pixels of another{where}"
        findings.append(Finding("equal", said, shown=same[:SHOWN]))
    return set(seen), findings


def without_captions(source: ImageFiles, splits: Iterable[ImageFiles]) -> Iterator[Finding]:
    """Image files below a folder that neither its data nor any split of them has a caption of."""
    known = {os.path.normpath(own.root / name) for own in (source, *splits) for name in own.images}
    found = sorted(_image_files(source.root))
    lone = [file for file in found if os.path.normpath(file) not in known]
    if lone:
        said = f"{len(lone):,} of {len(found):,} image files in {source.root}, which are not used"
        yield Finding("no caption", said, shown=lone[:SHOWN])


def shared(held_out: Data, train: Data, equal: int, *, every: bool) -> Iterator[Finding]:
    """What is judged by must not be learned from: images of both, by their place or their pixels; and captions.

    equal: how many hashes of pixels are in both.
    """
    both = np.isin(held_out.images, train.images)
    parts = f"{held_out.name} in {train.name}"
    if both.any():
        said = f"{int(both.sum()):,} of {len(both):,} images of {parts}, too; take them out of one"
        yield Finding("shared", said, wrong=True, shown=held_out.shown(held_out.first[both]))
    elif equal:
        said = f"{equal:,} images of {parts}, too, by their pixels; take them out of one"
        yield Finding("shared", said, wrong=True)
    else:
        said = "nor its pixels" if every else "(--all compares the pixels of all)"
        yield Finding("shared", f"no image of {parts} {said}")
    if not isinstance(held_out.pairs, Labelled):
        known = np.flatnonzero(np.isin(held_out.captions, train.captions))
        if len(known):
            said = f"{len(known):,} of {len(held_out.captions):,} captions of {parts}, word for word"
            yield Finding("said before", said, shown=held_out.shown(known))


def some(n: int, at_most: int) -> list[int]:
    """Numbers below n, in order: all of them, or a sample that is always the same."""
    if n <= at_most:
        return list(range(n))
    return sorted(np.random.default_rng(0).choice(n, at_most, replace=False).tolist())


def _of(seen: int, there: int) -> str:
    return "" if seen == there else f" (--all looks at all {there:,})"


def _hashes(names: Iterable[str]) -> NDArray[np.uint64]:
    return np.fromiter(map(place, names), dtype=np.uint64)


def _location(source: Pairs, i: int) -> str:
    """Where the image of a pair lies: a file, a place in one, or else the pair's name."""
    if isinstance(source, ImageFiles):
        return os.path.abspath(source.root / source.images[source.image_of[i]])
    if isinstance(source, TarShards):
        return f"{source.files[source.shard_of[i]].absolute()} {source.offsets[i]}"
    return source.ids[i]


def _digest(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()


def _image_files(root: Path) -> Iterator[str]:
    for folder, _, files in os.walk(root):
        yield from (os.path.join(folder, file) for file in files if file.lower().endswith(SUFFIXES))
