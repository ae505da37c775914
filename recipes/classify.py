"""Classify images of your own by the names of classes alone, with a trained model: nothing is trained.

    python recipes/classify.py --config recipes/configs/classify/default.yaml model.path=runs/openmoji \\
        run.images=photos "run.classes=[fox, owl, key]"

Writes classes.jsonl, a line an image, as they come, and classes.html when all are done. The same command, submitted
again, passes over what is classified already. No file stops it: those that cannot be read are named in both, and at the
end. The exit status is 0 if one image at least was classified.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from grr import config
from grr.cli.program import run_main
from grr.data.image_files import find_images
from grr.evaluation.zero_shot import class_embeddings
from grr.files.printable import printable
from grr.inference.classify import classify_files, read_classes
from grr.inference.pretrained import load_pretrained
from grr.inference.results import read_results, summary
from grr.reports.gallery import write_classes

PRINTED = 20  # images


@dataclass
class Run:
    """Options of the recipe."""

    images: str  # a file, a folder with all that is below it, or a glob in quotes
    classes: list[str] = field(default_factory=list)  # their names; or
    classes_file: str | None = None  # a text file of them, one a line
    folder: str = "classes"  # where classes.jsonl and classes.html are written
    top: int = 5  # classes of each image that are written, the likeliest
    batch_size: int = 50  # images at a time
    bf16: bool = False  # compute in bfloat16


@dataclass
class Model:
    """The model that judges."""

    path: str  # a run's folder, its model/, one of its checkpoints/step_N, or what recipes/convert.py wrote


SECTIONS: config.Sections = {"run": Run, "model": Model, "zero_shot": class_embeddings}


def main() -> int:
    cfg = config.load(SECTIONS)
    validate_config(cfg)
    run = cfg.get(Run)
    classes = run.classes or read_classes(str(run.classes_file))
    files = find_images(run.images)
    output = Path(run.folder, "classes.jsonl")

    # model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    trained = load_pretrained(cfg.model["path"], device=device, dtype=dtype)

    # classify
    outcome = classify_files(
        trained, files, classes, output, top=run.top, batch_size=run.batch_size, progress=True, **cfg.zero_shot
    )
    rows = read_results(output)
    page = write_classes(output.with_suffix(".html"), rows, cfg.model["path"], f"{len(classes):,} classes")

    # tell
    asked = set(files)
    named = [row for row in rows if "classes" in row and row["file"] in asked]
    for row in named[:PRINTED]:
        likely = ", ".join(f"{printable(c)} {p:.1%}" for c, p in zip(row["classes"], row["probabilities"], strict=True))
        print(f"{printable(row['file'])}: {likely}")
    print(summary(outcome, what="classified"))
    print(f"all classes are in {output}; see {page}")
    return outcome.status


def validate_config(cfg: config.Config) -> None:
    """Raises ValueError if the classes are not named, or named twice; `grr check` asks, too."""
    run = cfg.get(Run)
    if bool(run.classes) == (run.classes_file is not None):
        raise ValueError(
            f"classify: the classes must be named once, got {run.classes=}, {run.classes_file=}; set one of them"
        )


if __name__ == "__main__":
    run_main(main)
