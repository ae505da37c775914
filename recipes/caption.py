"""Caption image files and tar shards with a trained model.

    python recipes/caption.py --config recipes/configs/caption/default.yaml model.path=runs/openmoji run.images=photos
    torchrun --nproc_per_node 4 recipes/caption.py --config recipes/configs/caption/shards.yaml \\
        model.path=runs/mine run.images='cc12m/*.tar'

Of image files, writes captions.jsonl, a line per image and batch by batch. Of shards, writes NAME.jsonl and its counts,
NAME_stats.json, for each, and with run.write_tar a shard NAME.tar of the same images to train on. captions.html shows
some at the end. The same command, submitted again, skips images that have a caption. Images that cannot be read do not
end the run: files and the last message name them. The exit status is 0 if at least one image has a caption.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from grr import config  # before torch: grr sets how its threads wait

# isort: split
import torch
import torch.distributed as dist

from grr.cli.program import run_main
from grr.data.formats.shards import are_shards, find_shards
from grr.data.image_files import find_images
from grr.files.printable import printable
from grr.generation.generate import generate
from grr.inference.captioner import Captioner
from grr.inference.captioning.batches import CaptionOptions
from grr.inference.captioning.files import caption_files
from grr.inference.captioning.shards import caption_shards, sample_rows
from grr.inference.pretrained import load_pretrained
from grr.inference.results import Row, rows_of, summary
from grr.parallel.process_group import on_rank_0, process_group
from grr.reports.gallery import SHOWN, write_captions, write_shard_captions

PRINTED = 10  # captions


@dataclass
class Run:
    """Options of the recipe."""

    images: str  # a file, a folder, or a glob in quotes, of images or of tar shards; or a range, {00000..00009}.tar
    folder: str = "captions"  # where captions and captions.html are written
    batch_size: int = 50  # images at a time
    bf16: bool = False  # compute in bfloat16
    write_tar: bool = False  # of shards, write shards of the images that have a caption as well


@dataclass
class Model:
    """Trained model."""

    path: str  # a run's folder, its model/, one of its checkpoints/step_N, or hf-hub:owner/name


SECTIONS: config.Sections = {"run": Run, "model": Model, "captions": CaptionOptions, "generation": generate}


def main() -> int:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    with process_group() as device:
        # images
        shards = on_rank_0(lambda: find_shards(run.images) if are_shards(run.images) else [])
        files = [] if shards else on_rank_0(lambda: find_images(run.images))

        # model: whole in every process, because each captions other images
        dtype = torch.bfloat16 if run.bf16 else torch.float32
        trained = load_pretrained(cfg.model["path"], device=device, dtype=dtype)

        # write, and report
        return of_shards(cfg, trained, shards) if shards else of_files(cfg, trained, files)


def of_files(cfg: config.Config, trained: Captioner, files: list[str]) -> int:
    """Caption image files; returns the exit status."""
    run, options = cfg.get(Run), cfg.get(CaptionOptions)
    output, start = Path(run.folder, "captions.jsonl"), time.monotonic()
    outcome = caption_files(
        trained, files, output, cfg.generation, options=options, batch_size=run.batch_size, progress=True
    )
    seconds = time.monotonic() - start
    if dist.get_rank() == 0:
        page = write_captions(output.with_suffix(".html"), rows_of(output), cfg.model["path"])
        requested = set(files)
        show(islice((row for row in rows_of(output) if "caption" in row and row["file"] in requested), PRINTED))
        filtered = Counter(row["filtered"] for row in rows_of(output) if "filtered" in row and row["file"] in requested)
        print(summary(outcome._replace(done=outcome.done - filtered.total()), what="captioned"))
        for reason, number in filtered.items():
            print(f"{number:,} images have no caption, as the file says: {reason}")
        print(throughput(len(files) - outcome.before, seconds))
        print(f"all captions are in {output}; see {page}")
    return outcome.status


def of_shards(cfg: config.Config, trained: Captioner, shards: list[Path]) -> int:
    """Caption the images of tar shards; returns the exit status."""
    run, options = cfg.get(Run), cfg.get(CaptionOptions)
    folder, start = Path(run.folder), time.monotonic()
    records, count = caption_shards(
        trained,
        shards,
        folder,
        cfg.generation,
        options=options,
        write_tar=run.write_tar,
        batch_size=run.batch_size,
        progress=True,
    )
    seconds = time.monotonic() - start
    if dist.get_rank() == 0:
        shown = list(sample_rows(folder, shards, SHOWN))
        page = write_shard_captions(folder / "captions.html", shown, records, cfg.model["path"])
        show(row for row, _ in shown[:PRINTED])
        print(f"{records.total:,} images = {records.read:,} captioned + {records.skipped.total():,} skipped")
        for reason, number in records.skipped.most_common(PRINTED):
            names = ", ".join(printable(name) for name in records.names[reason][:PRINTED])
            print(f"  {number:,} skipped: {printable(reason)}: {names}{', ...' if number > PRINTED else ''}")
        for damage in records.damaged[:PRINTED]:
            print(f"  {printable(damage)}")
        print(throughput(count, seconds))
        print(f"all captions are in {folder}/*.jsonl; see {page}")
    return 0 if records.read else 1


def show(rows: Iterable[Row]) -> None:
    """Print captions."""
    for row in rows:
        captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        print(f"{printable(row['file'])}: {printable(' | '.join(captions))}")


def throughput(count: int, seconds: float) -> str:
    """Returns the throughput of a run as a sentence."""
    world = dist.get_world_size()
    processes = "1 process" if world == 1 else f"{world} processes"
    return f"{count:,} images in {seconds:.1f} s by {processes}, {count / seconds:.1f} images/s"


if __name__ == "__main__":
    run_main(main)
