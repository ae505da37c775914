"""The commands caption, classify, embed and search: uses of a trained model."""

import argparse
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

from grr.cli.parser import Parser, add_command, count
from grr.files.printable import printable

BATCH = 50  # images at a time
UNREADABLE = "Files that cannot be read are named. The exit status is 0 if at least one file could be read, else 1."
Row = dict[str, Any]  # of an image file, as in grr.inference.results


def add_caption(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        caption,
        "caption",
        "Write captions for images.",
        """
          grr caption runs/openmoji photo.png
          grr caption runs/openmoji photos 'more/**/*.jpg'
          grr caption hf-hub:laion/CoCa-ViT-B-32-laion2B-s13B-b90k photos

          grr caption runs/openmoji 'cc12m/*.tar'

        For thousands of images, with a page, options of generation, scores, several processes, and continuation after
        an interruption:

          grr run caption/default model.path=runs/openmoji run.images=photos

        Next: grr embed runs/openmoji photos --index index
        """,
    )
    _add_inputs(parser)


def caption(options: argparse.Namespace) -> int:
    """Print a caption for each image as it is computed."""
    from grr.data.formats.shards import are_shards, find_shards
    from grr.inference.captioning.files import caption_images
    from grr.inference.captioning.shards import caption_shard_images

    shards = [shard for word in options.images if are_shards(word) for shard in find_shards(word)]
    words = [word for word in options.images if not are_shards(word)]
    files = _find_images(words) if words else []
    trained = _load(options)
    batches = caption_images(trained, files, batch_size=options.batch_size)
    of_shards = caption_shard_images(trained, shards, batch_size=options.batch_size)
    return _print_rows(chain(batches, of_shards), lambda row: str(row.get("caption", "")))


def add_classify(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        classify,
        "classify",
        "Classify images, zero-shot, by the names of classes.",
        """
          grr classify runs/openmoji photo.png --classes fox,owl,key
          grr classify runs/openmoji photo.png --classes '"crane, a bird", "crane, a machine"'
          grr classify runs/openmoji photos --classes classes.txt --top 1
          grr classify runs/openmoji photos --classes fox,owl --template "a {}" --template "a drawing of a {}"

        With --output the results are written to classes.jsonl, a line per image, and to a page, classes.html; a run
        that was interrupted continues when the same command is run again:

          grr classify runs/openmoji photos --classes classes.txt --output classes

        Next: grr cp finetune_classifier
        """,
    )
    _add_inputs(parser)
    parser.add_argument(
        "--classes",
        metavar="A,B,C|FILE",
        required=True,
        help="names, in double quotes if they have a comma, or a text file with one name per line",
    )
    parser.add_argument("--top", type=count, metavar="N", default=5, help="classes per image; default: 5")
    parser.add_argument(
        "--template",
        metavar="TEXT",
        action="append",
        help="a sentence with {} for the class; may be repeated; default: four sentences",
    )
    parser.add_argument("--output", metavar="FOLDER", help="write classes.jsonl and classes.html there")


def classify(options: argparse.Namespace) -> int:
    """Print the likeliest classes of each image as they are computed, or write them to a folder."""
    from grr.evaluation.zero_shot import TEMPLATES
    from grr.inference.classify import classify_images, read_classes, split_classes

    classes = read_classes(options.classes) if Path(options.classes).is_file() else split_classes(options.classes)
    templates = tuple(options.template or TEMPLATES)
    files = _find_images(options.images)
    trained = _load(options)
    arguments: Any = {"templates": templates, "top": options.top, "batch_size": options.batch_size}
    if options.output is not None:
        return _write_classes(Path(options.output), options.model, trained, files, classes, arguments)
    return _print_rows(classify_images(trained, files, classes, **arguments), _format_classes)


def add_embed(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        embed,
        "embed",
        "Embed images into an index that grr search reads.",
        """
        Images are added to an index that exists. A run that was interrupted continues when the same command is run
        again. Unreadable files are listed, also in the index's left_out.json.

          grr embed runs/openmoji photos --index index

        Next: grr search index "a fox and a key"
        """,
    )
    _add_inputs(parser)
    parser.add_argument("--index", metavar="FOLDER", default="index", help="default: index")


def embed(options: argparse.Namespace) -> int:
    """Add images to an index."""
    from grr.inference.index import embed_files
    from grr.inference.results import summary

    files = _find_images(options.images)
    outcome = embed_files(
        _load(options),
        files,
        options.index,
        options.model,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
    )
    print(summary(outcome, what=f"in {options.index}"))
    if outcome.status == 0:
        print(f'next: grr search {quote(options.index)} "a fox and a key"')
    return outcome.status


def add_search(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        search,
        "search",
        "Find images in an index by sentences, or by similar images.",
        """
        Reads an index that grr embed wrote. A query that names a file is an image. Every image is compared. The exit
        status is 0 if at least one query could be read, else 1.

          grr search index "a fox and a key"
          grr search index "a fox" "an owl" photo.png --top 3
          grr search index "a fox" --page hits.html
        """,
    )
    parser.add_argument("index", metavar="INDEX", help="the folder of an index")
    parser.add_argument("queries", metavar="QUERY", nargs="+", help="a sentence, or an image file")
    parser.add_argument("--model", metavar="MODEL", help="default: the path of the model that made the index")
    parser.add_argument("--top", type=count, metavar="N", default=10, help="images per query; default: 10")
    parser.add_argument("--page", metavar="FILE", help="write the images found to an HTML page as well")


def search(options: argparse.Namespace) -> int:
    """Print the images of an index that are nearest to texts, or to images."""
    from grr.inference.index import as_text, look_up, open_index

    if not Path(options.index, "index.json").is_file():
        raise FileNotFoundError(
            f"{options.index} is not an index of images; make one from a model and images: "
            f"grr embed MODEL IMAGES --index {quote(options.index)}"
        )
    path = options.model or open_index(options.index).model_path
    trained = _load(argparse.Namespace(model=path, bf16=False))
    index = open_index(options.index, trained)
    images = [query for query in options.queries if Path(query).is_file()]
    texts = [query for query in options.queries if query not in images]
    found, bad = look_up(trained, index, texts, images, top=options.top)
    for file, why in bad.items():
        print(f"{printable(file)} could not be read: {printable(why)}", file=sys.stderr)
    if not found:
        return 1
    print(as_text(found))
    if options.page is not None:
        from grr.reports.gallery import write_hits

        print(f"\nsee {write_hits(Path(options.page), found, f'among {len(index):,} images', path)}")
    return 0


def _add_inputs(parser: Parser) -> None:
    parser.epilog = UNREADABLE
    parser.add_argument(
        "model", metavar="MODEL", help="a run's folder, its model/, one of its checkpoints/step_N, or hf-hub:owner/name"
    )
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders with their subfolders, or globs")
    parser.add_argument(
        "--batch-size", type=count, metavar="N", default=BATCH, help=f"images at a time; default: {BATCH}"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")


def _load(options: argparse.Namespace) -> Any:
    import torch

    from grr.inference.pretrained import load

    return load(options.model, dtype=torch.bfloat16 if options.bf16 else torch.float32)


def _find_images(words: Iterable[str]) -> list[str]:
    from grr.data.image_files import find_images

    return list(dict.fromkeys(file for word in words for file in find_images(word)))


def _format_classes(row: Row) -> str:
    return ", ".join(f"{name} {p:.1%}" for name, p in zip(row["classes"], row["probabilities"], strict=True))


def _write_classes(
    folder: Path, model: str, trained: Any, files: list[str], classes: list[str], arguments: dict[str, Any]
) -> int:
    from grr.inference.classify import classify_files
    from grr.inference.results import read_results, summary
    from grr.reports.gallery import write_classes

    output = folder / "classes.jsonl"
    outcome = classify_files(trained, files, classes, output, progress=sys.stderr.isatty(), **arguments)
    page = write_classes(output.with_suffix(".html"), read_results(output), model, f"{len(classes):,} classes")
    print(summary(outcome, what="classified"))
    print(f"all classes are in {output}; see {page}")
    return outcome.status


def _print_rows(batches: Iterable[list[Row]], format_row: Callable[[Row], str]) -> int:
    """Print a line per file, to stderr if it could not be read. Returns the exit status: 0 if one file was read."""
    done = 0
    for rows in batches:
        for row in rows:
            name = printable(row["file"])
            if "error" in row:
                print(f"{name} could not be read: {printable(row['error'])}", file=sys.stderr)
            else:
                print(f"{name}: {printable(format_row(row))}", flush=True)
                done += 1
    return 0 if done else 1
