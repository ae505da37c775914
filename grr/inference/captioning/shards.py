"""Captions of tar shards by all processes of a group, each of which takes an equal part of the images."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from grr.checkpoint.run_lock import RunLock, refuse_other_writers
from grr.data.image_files import batches
from grr.data.records import Records
from grr.generation.generate import check_generation, check_options
from grr.inference.captioner import Captioner
from grr.inference.captioning.batches import CaptionOptions, caption_batches
from grr.inference.captioning.files import BATCH, captions_made_with
from grr.inference.captioning.shard import (
    PARTS,
    CaptionedShard,
    ShardImage,
    read_shard_image,
    shard_images,
    shard_thumbnails,
)
from grr.inference.results import Row, check_made_with, held, json_line, rows_of, write_made_with
from grr.parallel.process_group import on_rank_0, rank_and_world, wait_for_all
from grr.parallel.progress import shared_bar

SAMPLED = 20  # shards of which a page shows images


@dataclass
class Share:
    """Images of a shard that one process captions: those from start to stop."""

    shard: Path
    start: int
    stop: int
    is_whole: bool  # whether no other process has a part of the shard
    left: int = -1  # images without a row; -1: not counted yet


def caption_shards(
    trained: Captioner,
    shards: Sequence[Path],
    folder: Path,
    generation: dict[str, Any] | None = None,
    *,
    options: CaptionOptions | None = None,
    write_tar: bool = False,
    batch_size: int = BATCH,
    progress: bool = False,
) -> tuple[Records, int]:
    """Caption the images of tar shards into a folder, as `CaptionedShard` describes, and return the counts of all
    shards and the number of images that this call captioned.

    Called by all processes of a group alike. Images are divided by their number, so a few shards use all processes;
    which process writes a caption does not change it. A shard that is complete is skipped; of one that is not, the
    images that have a row. A shard of which a file was removed is captioned again. Memory grows with the images of the
    largest shard, not with their sum.
    captioned + skipped (unreadable, below a limit, or with an empty caption) = images in the shards; parts of a damaged
    shard in which members cannot be separated are listed in `damaged`.
    Raises ValueError if the folder holds captions that were made with another model, other options or other shards; if
    two shards have one name; or if the folder is that of the shards.
    """
    check_generation("caption_shards", generation or {})
    several = (options or CaptionOptions()).num_captions
    check_options(trained.model, trained.tokenizer, generation or {}, num_captions=several)
    _check_names(shards, folder)
    made = json.loads(json.dumps(captions_made_with(trained, generation, options) | {"write_tar": write_tar}))
    rank, world = rank_and_world()
    outputs = {shard: CaptionedShard(folder, shard, write_tar=write_tar) for shard in shards}
    with RunLock(folder):
        left: list[Path] = on_rank_0(lambda: _begin(folder, made, outputs))
        counts = _count_images(left)
        mine = divide(list(zip(left, counts, strict=True)), world)[rank]
        before = sum(outputs[shard].facts()["images"] for shard in set(shards) - set(left))
        parts, name, captioned = folder / PARTS, "captions" if progress else None, 0
        with held(parts / f".rank{rank}.lock"):
            with shared_bar(parts, total=sum(counts) + before, initial=before, name=name) as add:
                work = partial(caption_shares, trained, mine, outputs, rank, generation, options)
                for count in work(batch_size=batch_size, skipped=add):
                    captioned += count
                    add(count)
            for shard in left[rank::world]:  # those of several processes, and those without an image left
                if not outputs[shard].is_complete():
                    outputs[shard].finish()
        wait_for_all()
        if rank == 0:
            shutil.rmtree(parts)
    total = Records()
    for shard in shards:
        total.add(Records.of_facts(outputs[shard].facts()))
    return total, sum(_gather(captioned))


def caption_shares(
    trained: Captioner,
    shares: Sequence[Share],
    outputs: Mapping[Path, CaptionedShard],
    rank: int,
    generation: dict[str, Any] | None = None,
    options: CaptionOptions | None = None,
    *,
    batch_size: int = BATCH,
    skipped: Callable[[int], None] = lambda count: None,
) -> Iterator[int]:
    """Caption the images of the shares of a process; yield their number after each batch, when its rows are written.

    skipped: is called with the number of images of a share that have a row already. A shard without another process is
    completed with its last image.
    """
    share_of = {share.shard: share for share in shares}
    of = _batches(shares, outputs, batch_size, skipped)
    read = partial(read_shard_image, size=trained.image_size, crop=trained.crop)
    for some in caption_batches(trained, of, read, lambda image: image.name, generation, options):
        share = share_of[some[0][0].shard]
        with outputs[share.shard].log(rank).open("ab") as log:
            log.write(b"".join(json_line(row) for _, row in some))
        share.left -= len(some)
        if share.left == 0 and share.is_whole:
            outputs[share.shard].finish()
        yield len(some)


def caption_shard_images(
    trained: Captioner, shards: Sequence[Path], generation: dict[str, Any] | None = None, *, batch_size: int = BATCH
) -> Iterator[list[Row]]:
    """Caption the images of tar shards; yield the rows of a batch, as `caption_images` does."""
    check_generation("caption_shard_images", generation or {})
    of = (some for shard in shards for some in batches(shard_images(shard)[0], batch_size))
    read = partial(read_shard_image, size=trained.image_size, crop=trained.crop)
    for rows in caption_batches(trained, of, read, lambda image: image.name, generation):
        yield [row for _, row in rows]


def sample_rows(folder: Path, shards: Sequence[Path], count: int) -> Iterator[tuple[Row, Tensor | str]]:
    """Yield at most `count` rows with a caption, with thumbnails of their images: the first of some complete shards."""
    step = -(-len(shards) // SAMPLED)
    chosen = shards[:: max(1, step)]
    each = -(-count // max(1, len(chosen)))
    for shard in chosen:
        rows = rows_of(CaptionedShard(folder, shard).rows)
        some = list(islice((row for row in rows if row.get("caption")), each))
        yield from zip(some, shard_thumbnails(shard, [row["file"] for row in some]), strict=True)


def divide(counts: Sequence[tuple[Path, int]], world: int) -> list[list[Share]]:
    """Divide the images of shards, in their order, among processes: the shares of each, equal to one image."""
    total, first = sum(count for _, count in counts), 0
    shares: list[list[Share]] = [[] for _ in range(world)]
    for shard, count in counts:
        for rank in range(world):
            start = max(first, rank * total // world)
            stop = min(first + count, (rank + 1) * total // world)
            if start < stop:
                share = Share(shard, start - first, stop - first, stop - start == count)
                shares[rank].append(share)
        first += count
    return shares


def _begin(folder: Path, made: dict[str, Any], outputs: dict[Path, CaptionedShard]) -> list[Path]:
    """Check what the folder was made with; returns the shards that are not complete, without half written lines."""
    if any(folder.glob("*_stats.json")) or any((folder / PARTS).glob("*.jsonl")):
        check_made_with("caption_shards", folder, made)
    refuse_other_writers((folder / PARTS).glob(".rank*.lock"))
    left = [shard for shard, output in outputs.items() if not output.is_complete()]
    write_made_with(folder, made)
    (folder / PARTS).mkdir(exist_ok=True)
    for output in outputs.values():
        output.begin()
    return left


def _batches(
    shares: Sequence[Share],
    outputs: Mapping[Path, CaptionedShard],
    batch_size: int,
    skipped: Callable[[int], None],
) -> Iterator[list[ShardImage]]:
    """Yield the images of each share that have no row, in batches; the headers of a shard are read when it begins."""
    for share in shares:
        done = outputs[share.shard].done()
        images = shard_images(share.shard)[0][share.start : share.stop]
        left = [image for image in images if image.name not in done]
        share.left = len(left)
        skipped(len(images) - len(left))
        yield from batches(left, batch_size)


def _count_images(shards: Sequence[Path]) -> list[int]:
    """Returns the number of images of each shard; each process reads the headers of some."""
    rank, world = rank_and_world()
    mine = {number: len(shard_images(shards[number])[0]) for number in range(rank, len(shards), world)}
    counts = {number: count for some in _gather(mine) for number, count in some.items()}
    return [counts[number] for number in range(len(shards))]


def _gather(value: Any) -> list[Any]:
    """Returns the value of each process."""
    world = rank_and_world()[1]
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def _check_names(shards: Sequence[Path], folder: Path) -> None:
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"caption_shards: shards must have different names, got two {twice}; caption each of their folders "
            "separately"
        )
    if folder.resolve() in {shard.parent.resolve() for shard in shards}:
        raise ValueError(f"caption_shards: the folder must not be that of the shards, got {folder}; set another folder")
