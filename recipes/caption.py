"""Caption images with a trained model: files, folders or globs.

    python recipes/caption.py --config recipes/configs/caption/default.yaml model.path=runs/openmoji run.images=photos

Writes captions.jsonl, a line per image and batch by batch, and captions.html at the end. The same command, submitted
again, skips images that have a caption. Files that cannot be read do not end the run: both files and the last message
name them. The exit status is 0 if at least one image has a caption.
"""

from dataclasses import dataclass
from pathlib import Path

from grr import config  # before torch: grr sets how its threads wait

# isort: split
import torch

from grr.cli.program import run_main
from grr.data.image_files import find_images
from grr.files.printable import printable
from grr.generation.generate import generate
from grr.inference.caption import caption_files
from grr.inference.pretrained import load_pretrained
from grr.inference.results import read_results, summary
from grr.parallel.device import default_device
from grr.reports.gallery import write_captions

PRINTED = 10  # captions


@dataclass
class Run:
    """Options of the recipe."""

    images: str  # a file, a folder, or a glob in quotes
    folder: str = "captions"  # where captions.jsonl and captions.html are written
    batch_size: int = 50  # images at a time
    bf16: bool = False  # compute in bfloat16


@dataclass
class Model:
    """Trained model."""

    path: str  # a run's folder, its model/, one of its checkpoints/step_N, or hf-hub:owner/name


SECTIONS: config.Sections = {"run": Run, "model": Model, "generation": generate}


def main() -> int:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    files = find_images(run.images)
    output = Path(run.folder, "captions.jsonl")

    # model
    device = default_device()
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    trained = load_pretrained(cfg.model["path"], device=device, dtype=dtype)

    # write
    outcome = caption_files(trained, files, output, cfg.generation, batch_size=run.batch_size, progress=True)
    rows = read_results(output)
    page = write_captions(output.with_suffix(".html"), rows, cfg.model["path"])

    # report
    requested = set(files)
    captioned = [row for row in rows if "caption" in row and row["file"] in requested]
    for row in captioned[:PRINTED]:
        print(f"{printable(row['file'])}: {printable(row['caption'])}")
    print(summary(outcome, what="captioned"))
    print(f"all captions are in {output}; see {page}")
    return outcome.status


if __name__ == "__main__":
    run_main(main)
