"""Checks of data before a run: counts, first samples, and faults of records, captions, tokens, images and splits."""

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
from grr.data.order import Epochs
from grr.data.pairs import ImageFiles, Ints, Pairs
from grr.seeds import stable_hash
from grr.tokenizers import Tokenizer

MAX_IMAGES = 500  # that are read of each data set, unless all are
MAX_CAPTIONS = 20_000  # whose tokens are counted, unless all are
SHOWN = 3  # examples of a finding
BATCHES = 200  # in which pairs with equal captions are counted
MAX_LEFT_OUT = 0.25  # fraction of the pairs that an epoch may leave out without a warning
MAX_UNKNOWN = 0.05  # fraction of unknown tokens
MAX_EQUAL_TOKENS = 0.01  # fraction of the captions that have the tokens of another caption
MAX_FALSE_NEGATIVES = 0.1  # fraction of the pairs of a batch whose caption another image has


class Finding(NamedTuple):
    """Line of a report: the subject, the message, whether it is a fault, and examples."""

    what: str
    message: str
    wrong: bool = False
    examples: Sequence[str] = ()


class Data:
    """Pairs with the name of their section, and hashes of their images and captions, computed once, 8 bytes each."""

    def __init__(self, name: str, pairs: Pairs) -> None:
        self.name, self.pairs = name, pairs
        self.source = pairs.pairs if isinstance(pairs, Labelled) else pairs
        _, self.first = np.unique(pairs.image_of, return_index=True)  # [images], a pair of each image

    @cached_property
    def images(self) -> NDArray[np.uint64]:
        """Hash of the location of each image: [images]."""
        return _hashes(_location(self.source, i) for i in self.first.tolist())

    @cached_property
    def captions(self) -> NDArray[np.uint64]:
        """Hash of each caption: [n]."""
        return _hashes(self.pairs.captions)

    def examples(self, rows: Ints | range) -> list[str]:
        """Describe the first of some pairs by id, caption and class."""
        return [f"{self.pairs.ids[i]}  {self.pairs.captions[i]!r}{self._class(int(i))}" for i in rows[:SHOWN]]

    def _class(self, i: int) -> str:
        if isinstance(self.pairs, Labelled) and self.pairs.labels[i] != IGNORE:
            return f" -> {self.pairs.classes[self.pairs.labels[i]]}"
        return ""


def check_counts(data: Data) -> Iterator[Finding]:
    """Report the numbers of pairs, images and classes, and the first pairs."""
    pairs, n, images = data.pairs, len(data.pairs), len(data.first)
    yield Finding("pairs", f"{n:,} of {images:,} images" + ("" if n == images else f", {n / images:.1f} each"))
    if isinstance(pairs, Labelled):
        counts = np.bincount(pairs.labels[pairs.labels != IGNORE], minlength=len(pairs.classes))
        none = int((pairs.labels == IGNORE).sum())
        message = f"{len(counts):,}, of {counts.min():,} to {counts.max():,} pairs"
        yield Finding("classes", message + (f"; {none:,} of {n:,} pairs in none" if none else ""))
    first, *others = data.examples(range(n))
    yield Finding("first", first, examples=others)


def check_records(data: Data, *, every: bool) -> Iterator[Finding]:
    """Report the records of the files, and those that were skipped, by reason."""
    records = data.pairs.records
    if records is None:
        return
    others = "".join(f" + {n:,} left out ({reason})" for reason, n in records.left_out.items())
    message = f"{records.total:,} in the files = {records.read:,} read + {records.skipped.total():,} skipped{others}"
    yield Finding("records", message)
    for reason, count in records.skipped.items():
        names = records.names[reason] if every else records.names[reason][:SHOWN]
        yield Finding("skipped", f"{count:,} of {records.total:,} records: {reason}", wrong=True, examples=names)
    for line in records.damaged if every else records.damaged[:SHOWN]:
        yield Finding("damaged", line, wrong=True)


def check_captions(data: Data) -> Iterator[Finding]:
    """Report empty captions, duplicate pairs, and captions that several images share."""
    pairs, captions = data.pairs, data.captions
    lengths = pairs.captions.lengths()
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        message = f"{len(empty):,} of {len(pairs):,} captions; write them, or remove the pairs"
        yield Finding("empty", message, wrong=True, examples=data.examples(empty))
    order = np.lexsort((captions, pairs.image_of))
    repeated = (np.diff(captions[order]) == 0) & (np.diff(pairs.image_of[order]) == 0)
    if repeated.any():
        message = f"{int(repeated.sum()):,} of {len(pairs):,} pairs, with the image and the caption of another"
        yield Finding("duplicates", message, examples=data.examples(order[1:][repeated]))
    if isinstance(pairs, Labelled):
        return  # one question about many images is not a fault
    distinct = np.concatenate((order[:1], order[1:][~repeated]))
    distinct = np.sort(distinct[lengths[distinct] > 0])
    _, first, counts = np.unique(captions[distinct], return_index=True, return_counts=True)
    several = np.flatnonzero(counts > 1)
    if len(several):
        worst = several[np.argsort(-counts[several], kind="stable")][:SHOWN]
        message = f"{len(several):,} of {len(counts):,} captions, each of several images, which it cannot distinguish"
        examples = [f"{counts[j]:,} images: {pairs.captions[distinct[first[j]]]!r}" for j in worst]
        yield Finding("same caption", message, examples=examples)


def check_tokens(data: Data, tokenizer: Tokenizer, context_length: int, *, every: bool) -> Iterator[Finding]:
    """Report the lengths of captions in tokens, how many a model of `context_length` tokens would truncate, and how
    many tokens are unknown to the vocabulary.

    tokenizer: one with a larger context_length, so that truncated tokens are counted.
    """
    captions = data.pairs.captions
    kept, counted = context_length - 3, tokenizer.context_length - 3  # tokens besides BOS, EOS and CLS
    rows = range(len(captions)) if every else sample_numbers(len(captions), MAX_CAPTIONS)
    lengths, unknown = np.zeros(len(rows), dtype=np.int64), 0
    texts, encoded = set[bytes](), set[bytes]()
    for k, i in enumerate(rows):
        ids = tokenizer.encode(captions[i])
        ids = ids[1 : len(ids) - 1 - ids[::-1].index(tokenizer.eos_id)]
        lengths[k] = len(ids)
        unknown += ids.count(tokenizer.unk_id)
        texts.add(_hash(captions[i].encode()))
        encoded.add(_hash(np.array(ids[:kept], dtype="<i8").tobytes()))
    cut, where = int((lengths > kept).sum()), _of(len(rows), len(captions))
    longest = f"{lengths.max()}{' or more' if lengths.max() == counted else ''}"
    tail = f"{cut:,} ({cut / len(rows):.1%}) are truncated to {kept}" if cut else f"none exceeds the limit of {kept}"
    message = f"{lengths.min()} to {longest} tokens, half of them at most {int(np.median(lengths))}; {tail}"
    yield Finding("captions", f"{message}{where}")
    total, equal = int(lengths.sum()), len(texts) - len(encoded)
    message = f"none of {total:,} tokens is unknown to the vocabulary"
    if unknown:
        message = f"{unknown:,} of {total:,} tokens ({unknown / total:.1%}) are unknown to the vocabulary"
    if equal:
        message += f"; {len(texts):,} distinct captions become {len(encoded):,}"
    wrong = unknown > MAX_UNKNOWN * total or equal > MAX_EQUAL_TOKENS * len(texts)
    if wrong and unknown:
        message += "; use a vocabulary of this language, or omit tokenizer.path to train one"
    elif wrong:
        message += "; raise tokenizer.context_length"
    yield Finding("unknown", f"{message}{where}", wrong=wrong)


def check_epoch(data: Data, batch_size: int) -> Finding:
    """Report how many pairs an epoch uses, with full batches that hold each image at most once."""
    n, groups = len(data.pairs), data.pairs.groups
    rows, sizes = groups.num_batches(batch_size), groups.sizes(np.arange(groups.count))
    used = rows * batch_size
    message = f"uses {used:,} of {n:,} pairs ({used / n:.1%}), {n - used:,} are left out"
    many = np.flatnonzero(sizes > rows)
    if len(many):
        message += (
            f": a batch holds each image once, and {len(many):,} images have more captions than there are batches"
        )
    worst = many[np.argsort(-sizes[many], kind="stable")][:SHOWN]
    examples = [f"{sizes[j]:,} captions: {data.pairs.ids[data.first[j]]}" for j in worst]
    wrong = n - used > MAX_LEFT_OUT * n
    if wrong:
        message += "; lower run.batch_size" + (", or remove captions of these" if len(many) else "")
    return Finding("epoch", message, wrong=wrong, examples=examples)


def check_false_negatives(data: Data, batch_size: int, seed: int) -> Finding | None:
    """Report the fraction of pairs whose batch has another image with an equal caption, in the first epoch."""
    order = Epochs(data.pairs.groups, seed=seed, batch_size=batch_size).batches(0, 0, BATCHES)
    captions = np.sort(data.captions[order], axis=1)  # [batches, b]
    equal = captions[:, 1:] == captions[:, :-1]
    edge = np.zeros((len(equal), 1), dtype=bool)
    fraction = float((np.hstack((edge, equal)) | np.hstack((equal, edge))).mean())
    if not fraction:
        return None
    message = (
        f"{fraction:.1%} of the pairs have a negative with their own caption in a batch of {batch_size:,}, "
        "which the contrastive loss separates from them"
    )
    wrong = fraction > MAX_FALSE_NEGATIVES
    return Finding("false negatives", message + ("; lower run.batch_size" if wrong else ""), wrong=wrong)


def check_images(data: Data, *, size: int, crop: Crop, every: bool) -> tuple[set[bytes], list[Finding]]:
    """Read images as a run does; returns hashes of their pixels, and findings of unreadable and of equal images."""
    pairs, n = data.pairs, len(data.first)
    rows = data.first[range(n) if every else sample_numbers(n, MAX_IMAGES)].tolist()
    bad, first_with, equal = dict[int, str](), dict[bytes, int](), list[str]()
    with tqdm(total=len(rows), desc=f"{data.name}: images", unit="image", delay=2, leave=False) as bar:
        for batch in read_batches(lambda i: pairs.load(i, size=size, crop=crop), batches(rows, 64)):
            bad |= batch.bad
            for i, pixels in zip(batch.good, () if batch.pixels is None else batch.pixels, strict=True):
                first = first_with.setdefault(_digest(pixels), i)
                if first != i:
                    equal.append(f"{pairs.ids[i]} and {pairs.ids[first]}")
            bar.update(len(batch.good) + len(batch.bad))
    where = _of(len(rows), n)
    names = [f"{pairs.ids[i]}: {reason}" for i, reason in bad.items()]
    message = f"{f'{len(bad):,}' if bad else 'none'} of {len(rows):,} images{where}"
    findings = [Finding("unreadable", message, wrong=bool(bad), examples=names if every else names[:SHOWN])]
    if equal:
        message = f"{len(equal):,} of {len(rows):,} images, with the pixels of another{where}"
        findings.append(Finding("equal", message, examples=equal[:SHOWN]))
    return set(first_with), findings


def check_unused_images(source: ImageFiles, splits: Iterable[ImageFiles]) -> Iterator[Finding]:
    """Report image files in the folder of some data that have no caption in any split."""
    used = {_composed(pairs.root / name) for pairs in (source, *splits) for name in pairs.images}
    files = sorted(_image_files(source.root))
    unused = [file for file in files if _composed(file) not in used]
    if unused:
        message = f"{len(unused):,} of {len(files):,} image files in {source.root}, which are not used"
        yield Finding("no caption", message, examples=unused[:SHOWN])


def check_overlap(held_out: Data, train: Data, equal: int, *, every: bool) -> Iterator[Finding]:
    """Report images of held-out data that are in the training data, by location or by pixels, and equal captions.

    equal: number of pixel hashes that both have.
    """
    both = np.isin(held_out.images, train.images)
    parts = f"{held_out.name} in {train.name}"
    if both.any():
        message = f"{int(both.sum()):,} of {len(both):,} images of {parts}; remove them from one of the two"
        yield Finding("shared", message, wrong=True, examples=held_out.examples(held_out.first[both]))
    elif equal:
        message = f"{equal:,} images of {parts}, by their pixels; remove them from one of the two"
        yield Finding("shared", message, wrong=True)
    else:
        by_pixels = "by location or by pixels" if every else "(--all compares the pixels of all)"
        yield Finding("shared", f"no image of {parts} {by_pixels}")
    if not isinstance(held_out.pairs, Labelled):
        known = np.flatnonzero(np.isin(held_out.captions, train.captions))
        if len(known):
            message = f"{len(known):,} of {len(held_out.captions):,} captions of {parts}, word for word"
            yield Finding("shared captions", message, examples=held_out.examples(known))


def sample_numbers(n: int, at_most: int) -> list[int]:
    """Returns all numbers below n, or a sorted sample of them, the same at every call."""
    if n <= at_most:
        return list(range(n))
    return sorted(np.random.default_rng(0).choice(n, at_most, replace=False).tolist())


def _of(count: int, total: int) -> str:
    return "" if count == total else f" (--all checks all {total:,})"


def _hashes(names: Iterable[str]) -> NDArray[np.uint64]:
    return np.fromiter(map(stable_hash, names), dtype=np.uint64)


def _location(source: Pairs, i: int) -> str:
    """Returns the location of a pair's image: a file, an offset in one, or else the pair's id."""
    if isinstance(source, ImageFiles):
        return os.path.abspath(source.root / source.images[source.image_of[i]])
    if isinstance(source, TarShards):
        file, offset, _ = source.place(i)
        return f"{file.absolute()} {offset}"
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
