"""The commands ls, cp, run and check: recipes and their configs."""

import argparse
import os
import sys
from pathlib import Path
from shlex import quote
from typing import Any

from grr.cli.parser import add_command, count
from grr.experiments import catalog
from grr.files.printable import printable, printable_lines


def add_ls(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        list_recipes,
        "ls",
        "List the installed recipes and configs.",
        """
        Each is shown with its title. A config is called RECIPE/CONFIG.

          grr ls
          grr ls pretrain evaluate
          grr ls | grep photograph

        Next: grr run pretrain/openmoji
        """,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="recipes or configs; default: all")


def list_recipes(options: argparse.Namespace) -> int:
    """Print the names and titles of recipes and configs, aligned."""
    wanted = [catalog.find(name) for name in options.names] or catalog.recipes()
    items = [item for one in wanted for item in (one, *(catalog.configs(one.name) if one.is_recipe else []))]
    names = [item.name if item.is_recipe else f"  {item.name}" for item in items]
    width = max(map(len, names)) + 2
    for name, item in zip(names, items, strict=True):
        print(f"{name:<{width}}{printable(catalog.about(item))}")
    return 0


def add_cp(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        copy_recipe,
        "cp",
        "Copy a recipe with its configs, or one config, to edit it.",
        """
        The files keep their places below recipes/, so that the commands in their headers work unchanged. No file is
        overwritten.

          grr cp pretrain                       recipes/pretrain.py and recipes/configs/pretrain/*.yaml
          grr cp pretrain/photos                recipes/configs/pretrain/photos.yaml
          grr cp pretrain/photos mine.yaml      one file to one file
          grr cp pretrain experiment            all files, below the folder experiment

        Next: grr check recipes/configs/pretrain/photos.yaml data.path=my_photos validation.path=my_photos
        """,
    )
    parser.add_argument("name", metavar="NAME", help="a name that grr ls prints: pretrain, or pretrain/photos")
    parser.add_argument(
        "destination",
        metavar="DESTINATION",
        nargs="?",
        default="recipes",
        help="a folder, or a file that ends in .py or .yaml; default: recipes",
    )


def copy_recipe(options: argparse.Namespace) -> int:
    """Copy a recipe with its configs, or one config, out of the package."""
    files = catalog.copy(options.name, Path(options.destination))
    print(*files, sep="\n")
    recipe, _, config = options.name.partition("/")
    if config:
        named = f" --recipe {recipe}" if Path(options.destination).suffix else ""
        file = quote(str(files[0]))
        print(f"next: edit the file, then grr check {file}{named}, and grr run {recipe} --config {file}")
    else:
        print(f"next: edit the files, then grr run {quote(str(files[0]))} --help")
    return 0


def add_run(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        run_recipe,
        "run",
        "Run an installed recipe, or a copy of one.",
        """
        The arguments after the name go to the recipe: section.key=value, or --help, which lists all keys. A training
        run that was interrupted continues when the same command is run again.

          grr run pretrain/openmoji run.epochs=2 run.folder=runs/short
          grr run pretrain --config mine.yaml
          grr run --nproc 4 pretrain/cc12m_grr data.shards='/data/*.tar' validation.shards='/data/*.tar'
          grr run pretrain --help

        On several machines, torchrun runs an installed recipe as a module:

          torchrun --nnodes 2 --nproc_per_node 8 ... -m grr.recipes.pretrain --config mine.yaml

        Next: grr caption runs/openmoji photo.png
        """,
    )
    parser.add_argument("--nproc", type=count, metavar="N", help="processes on this machine, one per GPU, by torchrun")
    parser.add_argument(
        "name",
        metavar="NAME",
        help="RECIPE, RECIPE/CONFIG, or a file: a recipe, or a config in a folder configs/RECIPE",
    )
    parser.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help="--config FILE, section.key=value ...")


def run_recipe(options: argparse.Namespace) -> int:
    """Replace this process by the recipe, so that signals reach the recipe and the exit status is its own."""
    words = list(options.words)
    if misplaced := [word for word in words if word.split("=")[0] == "--nproc"]:
        raise ValueError(f"{misplaced[0]} must stand before the name: grr run --nproc 2 {options.name} ...")
    nproc = [] if options.nproc is None else ["--nproc", str(options.nproc)]
    command = catalog.command([*nproc, options.name, *words])
    recipe = Path(command[catalog.recipe_place(command)])
    _report_recipe(recipe, Path(command[command.index("--config") + 1]) if "--config" in command[:-1] else None)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])


def add_check(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        check_config,
        "check",
        "Check a config and its data before a run.",
        """
        Reports all mistakes in the config at once; then describes the data: their number, the first samples,
        unreadable images, truncated captions, duplicates, images without captions, and images that training and
        validation share. The exit status is 1 if a line is marked with !, and 2 if the config has a mistake.

          grr check pretrain/openmoji
          grr check mine.yaml --recipe pretrain data.path=my_photos validation.path=my_photos
          grr check recipes/configs/pretrain/photos.yaml --all
          grr check --nproc 4 pretrain/cc12m_grr data.shards='/data/*.tar' validation.shards='/data/*.tar'

        Next: grr run pretrain --config mine.yaml
        """,
    )
    parser.add_argument("config", metavar="CONFIG", help="a file, or a name that grr ls prints")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="values that replace the file's")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help="the config's recipe; default: by its folder, configs/<recipe>/"
    )
    parser.add_argument(
        "--nproc",
        type=count,
        metavar="N",
        default=1,
        help="processes of the run, on all machines, among which batches are divided; default: 1",
    )
    parser.add_argument("--all", action="store_true", help="read every image and caption, not a sample")


def check_config(options: argparse.Namespace) -> int:
    """Print all mistakes of a config and a description of its data."""
    from grr.cli.check import check, read_config

    file = catalog.config_file(options.config)
    recipe = catalog.recipe_of(file, options.recipe)
    _report_recipe(recipe, file)
    cfg, sections = read_config(file, options.overrides, recipe)
    marked = 0
    print(f"  {'config':<16}{file}, of {recipe}: no mistake")
    for finding in check(cfg, sections, every=options.all, processes=options.nproc):
        marked += finding.wrong
        print(f"{'!' if finding.wrong else ' '} {finding.what:<16}{printable_lines(finding.message)}", flush=True)
        for line in finding.examples:
            print(f"  {'':<16}{printable_lines(line)}")
    words = " ".join(quote(word) for word in (options.config, *options.overrides))
    nproc = f" --nproc {options.nproc}" if options.nproc > 1 else ""
    if marked:
        named = f" --recipe {quote(options.recipe)}" if options.recipe else ""
        lines = "1 line is" if marked == 1 else f"{marked} lines are"
        print(f"\n{lines} marked !; correct what is wrong, then run grr check{named}{nproc} {words}")
        return 1
    if Path(options.config).is_file():
        name = recipe.stem if recipe.parent == catalog.RECIPES else str(recipe)
        words = f"{quote(name)} --config {words}"
    print(f"\nnothing is wrong; next: grr run{nproc} {words}")
    return 0


def _report_recipe(recipe: Path, config: Path | None) -> None:
    """Print, before it is imported, which recipe is used if it is not the installed one, or if a copy of it beside the
    config is not used.
    """
    if recipe.absolute().parent != catalog.RECIPES:
        print(f"recipe: {recipe}", file=sys.stderr)
    if config is not None and (other := catalog.left_out(config, recipe)) is not None:
        print(
            f"recipe: the installed {recipe.stem}, not {other}; to use that one, name it: grr run {quote(str(other))}, "
            f"grr check --recipe {quote(str(other))}",
            file=sys.stderr,
        )
