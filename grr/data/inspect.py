"""A look at data before hours are spent on them: how much there is, what comes first, what is odd, what is wrong."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from grr.data.collate import IGNORE
from grr.data.formats.shards import TarShards
from grr.data.image_files import batches, read_batches
from grr.data.images import SUFFIXES, Crop
from grr.data.labelled import Labelled
from grr.data.order import epoch_order, num_batches
from grr.data.pairs import ImageFiles, Ints, Pairs, place
from grr.tokenizers import Tokenizer

IMAGES = 500  # looked at in each data set, unless all are
CAPTIONS = 20_000  # whose tokens are counted, unless all are
SHOWN = 3  # samples, and names of what is wrong
BATCHES = 200  # in which pairs of the same caption are counted
LEFT_OUT = 0.25  # of the pairs, marked if an epoch leaves out more
UNKNOWN = 0.05  # of the tokens, marked if more are unknown
ALIKE = 0.01  # of the captions, marked if more cannot be told apart by their tokens
SAME = 0.1  # of the pairs of a batch, marked if more have a caption that another image has


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


def counted(data: Data, *, every: bool) -> Iterator[Finding]:
    """What the files hold, and what was skipped of it, by reason."""
    records = data.pairs.records
    if records is None:
        return
    others = "".join(f" + {n:,} left out ({reason})" for reason, n in records.left_out.items())
    said = f"{records.total:,} in the files = {records.read:,} read + {records.skipped.total():,} skipped{others}"
    yield Finding("records", said)
    for reason, count in records.skipped.items():
        names = records.names[reason]
        yield Finding(
            "skipped",
            f"{count:,} of {records.total:,} records: {reason}",
            wrong=True,
            shown=names if every else names[:SHOWN],
        )
    for line in records.damaged if every else records.damaged[:SHOWN]:
        yield Finding("damaged", line, wrong=True)


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


def tokens(data: Data, tokenizer: Tokenizer, context_length: int, *, every: bool) -> Iterator[Finding]:
    """Count the tokens of captions, the captions that a model of `context_length` tokens would cut, and the tokens that
    the vocabulary does not know.

    tokenizer: one that reads more, so that what would be cut can be counted.
    """
    captions, room, most = (
        data.pairs.captions,
        context_length - 3,
        tokenizer.context_length - 3,
    )  # without BOS, EOS and CLS
    rows = range(len(captions)) if every else some(len(captions), CAPTIONS)
    lengths, unknown = np.zeros(len(rows), dtype=np.int64), 0
    texts, read = set[bytes](), set[bytes]()
    for k, i in enumerate(rows):
        ids = tokenizer.encode(captions[i])
        ids = ids[1 : len(ids) - 1 - ids[::-1].index(tokenizer.eos_id)]
        lengths[k] = len(ids)
        unknown += ids.count(tokenizer.unk_id)
        texts.add(_hash(captions[i].encode()))
        read.add(_hash(np.array(ids[:room], dtype="<i8").tobytes()))
    cut, where = int((lengths > room).sum()), _of(len(rows), len(captions))
    longest = f"{lengths.max()}{' or more' if lengths.max() == most else ''}"
    tail = f"{cut:,} ({cut / len(rows):.1%}) are cut to {room}" if cut else f"none is cut, there is room for {room}"
    said = f"{lengths.min()} to {longest} tokens, half of them at most {int(np.median(lengths))}; {tail}"
    yield Finding("captions", f"{said}{where}")
    total, alike = int(lengths.sum()), len(texts) - len(read)
    share = (
        f"{unknown:,} of {total:,} tokens ({unknown / total:.1%}) are" if unknown else f"none of {total:,} tokens is"
    )
    said = f"{share} unknown to the vocabulary"
    if alike:
        said += f"; {len(texts):,} different captions become {len(read):,}"
    wrong = unknown > UNKNOWN * total or alike > ALIKE * len(texts)
    if wrong:
        said += (
            "; take a vocabulary of this language, or leave tokenizer.path out to train one"
            if unknown
            else ("; raise tokenizer.context_length")
        )
    yield Finding("unknown", f"{said}{where}", wrong=wrong)


def epoch(data: Data, batch_size: int) -> Finding:
    """What of the pairs an epoch uses: no batch holds an image twice, and none is filled up."""
    n, sizes = len(data.pairs), np.bincount(np.unique(data.pairs.image_of, return_inverse=True)[1])
    rows = num_batches(data.pairs.image_of, batch_size=batch_size)
    used = rows * batch_size
    said = f"uses {used:,} of {n:,} pairs ({used / n:.1%}), {n - used:,} are left out"
    many = np.flatnonzero(sizes > rows)
    if len(many):
        said += f": a batch holds no image twice, and {len(many):,} images have more captions than there are batches"
    worst = many[np.argsort(-sizes[many], kind="stable")][:SHOWN]
    shown = [f"{sizes[j]:,} captions: {data.pairs.ids[data.first[j]]}" for j in worst]
    wrong = n - used > LEFT_OUT * n
    if wrong:
        said += "; lower run.batch_size" + (", or take captions of these out" if len(many) else "")
    return Finding("epoch", said, wrong=wrong, shown=shown)


def false_negatives(data: Data, batch_size: int, seed: int) -> Finding | None:
    """Pairs that meet another image with their own caption in a batch, as the first epoch has them."""
    order = epoch_order(data.pairs.image_of, seed=seed, epoch=0, batch_size=batch_size)[:BATCHES]
    captions = np.sort(data.captions[order], axis=1)  # [batches, b]
    same = captions[:, 1:] == captions[:, :-1]
    edge = np.zeros((len(same), 1), dtype=bool)
    fraction = float((np.hstack((edge, same)) | np.hstack((same, edge))).mean())
    if not fraction:
        return None
    said = (
        f"{fraction:.1%} of the pairs meet another image with their caption in a batch of {batch_size:,}, and are "
        "trained to be unlike it"
    )
    wrong = fraction > SAME
    return Finding("false negatives", said + ("; lower run.batch_size" if wrong else ""), wrong=wrong)


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
    known = {_composed(own.root / name) for own in (source, *splits) for name in own.images}
    found = sorted(_image_files(source.root))
    lone = [file for file in found if _composed(file) not in known]
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
    return _hash(pixels.numpy().tobytes())


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _composed(file: str | Path) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(file))


def _image_files(root: Path) -> Iterator[str]:
    for folder, _, files in os.walk(root):
        yield from (os.path.join(folder, file) for file in files if file.lower().endswith(SUFFIXES))
