"""Find images in an index that recipes/embed.py made: by texts, or by images that they are like.

    python recipes/search.py --config recipes/configs/search/default.yaml "run.texts=[a fox and a key, a moon]"
    python recipes/search.py --config recipes/configs/search/default.yaml run.images=photo.jpg

Every image is compared, none is passed over for speed. Prints what it found for each query, and writes a page of it.
The exit status is 0 if one query at least could be read.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from grr import config
from grr.cli.program import run_main
from grr.data.image_files import find_images
from grr.files.printable import printable
from grr.inference.index import as_text, look_up, open_index
from grr.inference.pretrained import load_pretrained
from grr.reports.gallery import write_hits


@dataclass
class Run:
    """Options of the recipe."""

    index: str = "index"  # the folder that recipes/embed.py wrote
    texts: list[str] = field(default_factory=list)  # what to look for; without brackets, one text
    images: str | None = None  # images to look for others like them: a file, a folder, or a glob in quotes
    top: int = 10  # images for each query
    page: str | None = None  # where the page is written; null: hits.html in the folder of the index


@dataclass
class Model:
    """The model that made the index."""

    path: str | None = None  # null: where it was then


SECTIONS: config.Sections = {"run": Run, "model": Model}


def main() -> int:
    cfg = config.load(SECTIONS)
    validate_config(cfg)
    run = cfg.get(Run)
    images = find_images(run.images) if run.images is not None else []
    path = cfg.model["path"] or open_index(run.index).model_path

    # look
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_pretrained(path, device=device)
    index = open_index(run.index, trained)
    found, bad = look_up(trained, index, run.texts, images, top=run.top)

    # tell
    for file, why in bad.items():
        print(f"{printable(file)} could not be read: {printable(why)}")
    if not found:
        return 1
    page = Path(run.page) if run.page else index.folder / "hits.html"
    print(as_text(found))
    print(f"among {len(index):,} images; see {write_hits(page, found, f'among {len(index):,} images', path)}")
    return 0


def validate_config(cfg: config.Config) -> None:
    """Raises ValueError if there is nothing to look for; `grr check` asks, too."""
    if not cfg.run["texts"] and cfg.run["images"] is None:
        raise ValueError("search: there must be something to look for; give run.texts=[a fox] or run.images=photo.jpg")


if __name__ == "__main__":
    run_main(main)
