"""Embed images of your own into an index on disk, in which recipes/search.py finds them by texts and by images.

    python recipes/embed.py --config recipes/configs/embed/default.yaml model.path=runs/openmoji run.images=photos

Written in parts of 1000 images. The same command, submitted again, goes on behind the last part; with other images, it
adds them. No file stops it: those that cannot be read are named at the end, and in left_out.json. The exit status is 0
if one image at least is in the index.
"""

from dataclasses import dataclass

import torch

from grr import config
from grr.cli.program import run_main
from grr.data.image_files import find_images
from grr.inference.index import embed_files
from grr.inference.pretrained import load_pretrained
from grr.inference.results import summary


@dataclass
class Run:
    """Options of the recipe."""

    images: str  # a file, a folder with all that is below it, or a glob in quotes
    index: str = "index"  # the folder of the index
    batch_size: int = 50  # images at a time
    bf16: bool = False  # compute in bfloat16; float32 is stored


@dataclass
class Model:
    """The model that looks at the images."""

    path: str  # a run's folder, its model/, one of its checkpoints/step_N, or what recipes/convert.py wrote


SECTIONS: config.Sections = {"run": Run, "model": Model}


def main() -> int:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    files = find_images(run.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    trained = load_pretrained(cfg.model["path"], device=device, dtype=dtype)
    outcome = embed_files(trained, files, run.index, cfg.model["path"], batch_size=run.batch_size, progress=True)
    print(summary(outcome, what=f"in {run.index}"))
    return outcome.status


if __name__ == "__main__":
    run_main(main)
