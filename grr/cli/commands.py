"""What each command of `grr` does; each imports what it needs when it runs, so that lists come at once.

A command prints what a person wants to know, the next command last, and gives its exit status. What went wrong it
raises, as ValueError, OSError or ImportError.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from shlex import quote
from typing import Any

from grr.experiments import catalog as installed
from grr.files.printable import printable, printable_lines

# --- recipes and configs -------------------------------------------------------------------------------------------


def ls(options: argparse.Namespace) -> int:
    """List the recipes and configs that are installed."""
    wanted = [installed.find(name) for name in options.names] or installed.recipes()
    every = [item for one in wanted for item in (one, *(installed.configs(one.name) if one.is_recipe else []))]
    names = [item.name if item.is_recipe else f"  {item.name}" for item in every]
    width = max(map(len, names)) + 2
    for name, item in zip(names, every, strict=True):
        print(f"{name:<{width}}{printable(installed.about(item))}")
    return 0


def cp(options: argparse.Namespace) -> int:
    """Copy a recipe with its configs, or a config, out of the package."""
    files = installed.copy(options.name, Path(options.destination))
    print(*files, sep="\n")
    recipe, _, config = options.name.partition("/")
    if config:
        named = f" --recipe {recipe}" if Path(options.destination).suffix else ""
        file = quote(str(files[0]))
        print(f"next: change what you like, then grr check {file}{named}, and grr run {recipe} --config {file}")
    else:
        print(f"next: change what you like, then grr run {quote(str(files[0]))} --help")
    return 0


def run(options: argparse.Namespace) -> int:
    """Start a recipe in place of this program, so that its signals and its exit status are the recipe's."""
    words = list(options.words)
    if misplaced := [word for word in words if word.split("=")[0] == "--nproc"]:
        raise ValueError(f"{misplaced[0]} must stand before the name: grr run --nproc 2 {options.name} ...")
    nproc = [] if options.nproc is None else ["--nproc", str(options.nproc)]
    command = installed.command([*nproc, options.name, *words])
    recipe = Path(command[installed.recipe_place(command)])
    _say_which(recipe, Path(command[command.index("--config") + 1]) if "--config" in command[:-1] else None)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])


def check(options: argparse.Namespace) -> int:
    """Tell all that is wrong with a config, and what its data look like."""
    from grr.cli.check import check, read_config

    file = installed.config_file(options.config)
    script = installed.recipe_of(file, options.recipe)
    _say_which(script, file)
    cfg, sections = read_config(file, options.overrides, script)
    wrong = 0
    print(f"  {'config':<16}{file}, of {script}: no mistake")
    for finding in check(cfg, sections, every=options.all, processes=options.nproc):
        wrong += finding.wrong
        print(f"{'!' if finding.wrong else ' '} {finding.what:<16}{printable_lines(finding.message)}", flush=True)
        for line in finding.examples:
            print(f"  {'':<16}{printable_lines(line)}")
    words = " ".join(quote(word) for word in (options.config, *options.overrides))
    nproc = f" --nproc {options.nproc}" if options.nproc > 1 else ""
    if wrong:
        named = f" --recipe {quote(options.recipe)}" if options.recipe else ""
        lines = "line" if wrong == 1 else "lines"
        print(f"\n{wrong} {lines} marked ! want your attention; then, grr check{named}{nproc} {words}")
        return 1
    own = Path(options.config).is_file()
    print(f"\nnothing is wrong; next: grr run{nproc} {f'{quote(_name_of(script))} --config {words}' if own else words}")
    return 0


# --- vocabularies --------------------------------------------------------------------------------------------------


def fetch(options: argparse.Namespace) -> int:
    """Put T5's vocabulary in its place, if it is whole."""
    from grr.tokenizers.vocabulary import fetch_t5

    print(f"{fetch_t5(options.file, Path(options.output))}: T5's vocabulary, whole")
    print(f"next: grr run pretrain/photos tokenizer.path={quote(options.output)}")
    return 0


def train(options: argparse.Namespace) -> int:
    """Train a vocabulary on captions."""
    from grr.config import OVERRIDE
    from grr.tokenizers.vocabulary import train_vocabulary

    overrides = [word for word in options.captions if OVERRIDE.match(word)]
    sources = [word for word in options.captions if word not in overrides]
    tokenizer = train_vocabulary(
        [installed.config_file(s) if _is_config(s) else Path(s) for s in sources],
        overrides,
        Path(options.output),
        vocab_size=options.vocab_size,
    )
    print(f"{options.output}: {tokenizer.vocab_size:,} ids")
    print(f"next: grr run pretrain/photos tokenizer.path={quote(options.output)}")
    return 0


# --- trained models ------------------------------------------------------------------------------------------------


def caption(options: argparse.Namespace) -> int:
    """Print a caption of each image, as they come."""
    from grr.inference.caption import caption_images

    files = _images(options.images)
    return _told(caption_images(_opened(options.model), files), lambda row: str(row["caption"]))


def classify(options: argparse.Namespace) -> int:
    """Print the likeliest classes of each image, as they come."""
    from grr.inference.classify import classify_images, read_classes, split_classes

    classes = read_classes(options.classes) if Path(options.classes).is_file() else split_classes(options.classes)
    files = _images(options.images)
    rows = classify_images(_opened(options.model), files, classes, top=options.top)
    return _told(
        rows,
        lambda row: ", ".join(f"{name} {p:.1%}" for name, p in zip(row["classes"], row["probabilities"], strict=True)),
    )


def embed(options: argparse.Namespace) -> int:
    """Embed images into an index."""
    from grr.inference.index import embed_files
    from grr.inference.results import told

    files = _images(options.images)
    outcome = embed_files(_opened(options.model), files, options.index, options.model, progress=sys.stderr.isatty())
    print(told(outcome, what=f"in {options.index}"))
    if outcome.status == 0:
        print(f'next: grr search {quote(options.index)} "a fox and a key"')
    return outcome.status


def search(options: argparse.Namespace) -> int:
    """Print the images of an index that are nearest to texts, or to images."""
    from grr.inference.index import as_text, look_up, open_index

    if not Path(options.index, "index.json").is_file():
        raise FileNotFoundError(
            f"{options.index} is no index of images; make one of a model and a folder of images: "
            f"grr embed MODEL IMAGES --index {quote(options.index)}"
        )
    trained = _opened(options.model or open_index(options.index).model_path)
    images = [query for query in options.queries if Path(query).is_file()]
    texts = [query for query in options.queries if query not in images]
    found, bad = look_up(trained, open_index(options.index, trained), texts, images, top=options.top)
    for file, why in bad.items():
        print(f"{printable(file)}: {printable(why)}", file=sys.stderr)
    if found:
        print(as_text(found))
    return 0 if found else 1


def _opened(model: str) -> Any:
    import torch

    from grr.inference.pretrained import load_pretrained

    return load_pretrained(model, device="cuda" if torch.cuda.is_available() else "cpu")


def _images(words: Iterable[str]) -> list[str]:
    from grr.data.image_files import find_images

    return list(dict.fromkeys(file for word in words for file in find_images(word)))


def _told(batches: Iterable[list[dict[str, Any]]], said: Callable[[dict[str, Any]], str]) -> int:
    """Print a line for each file; those that cannot be read go to the other stream."""
    done = 0
    for rows in batches:
        for row in rows:
            name = printable(row["file"])
            if "error" in row:
                print(f"{name} could not be read: {printable(row['error'])}", file=sys.stderr)
            else:
                print(f"{name}: {printable(said(row))}", flush=True)
                done += 1
    return 0 if done else 1


# --- names ---------------------------------------------------------------------------------------------------------


def _is_config(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or (not Path(name).exists() and "/" in name and "." not in name)


def _say_which(recipe: Path, config: Path | None) -> None:
    """Name a recipe that is not the installed one before it is imported, and one that might be expected and is not."""
    if recipe.absolute().parent != installed.RECIPES:
        print(f"recipe: {recipe}", file=sys.stderr)
    if config is not None and (other := installed.left_out(config, recipe)) is not None:
        print(
            f"recipe: the installed {recipe.stem}, not {other}, which grr run {quote(str(other))} and grr check "
            f"--recipe {quote(str(other))} take",
            file=sys.stderr,
        )


def _name_of(recipe: Path) -> str:
    return recipe.stem if recipe.parent == installed.RECIPES else str(recipe)
