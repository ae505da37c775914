"""The command `grr`: recipes, configs, data, vocabularies and trained models, without a line of Python.

Here are its words and its help; what each command does is in grr/cli/commands.py.
"""

import argparse
import difflib
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from grr import __version__
from grr.cli import commands
from grr.cli.program import attempt
from grr.experiments import catalog as installed

Command = Callable[[argparse.Namespace], int]
HELP = """\
Train contrastive captioners and use them. From nothing to a model that writes and finds, in minutes on a laptop:

  grr ls                                            what there is to run
  grr run pretrain/openmoji                         train on the built-in pictures; see runs/openmoji/report.html
  grr caption runs/openmoji photo.png               what it says of an image
  grr embed runs/openmoji photos --index index      look at a folder of images
  grr search index "a fox and a key"                find images by a sentence

The built-in pictures are installed by pip install "grr-coca[openmoji]". With pictures of your own: grr cp
pretrain/photos, edit it, grr check it, grr run it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Gives the exit status: 0 if it did what was asked, 1 if not, 2 if it was asked wrongly."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: threads that wait do not spin
    options = _parser().parse_args((sys.argv[1:] if argv is None else argv) or ["--help"])
    command: Command = options.command
    return attempt(lambda: command(options), options.prog)


# --- words and help ----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """One that guesses what a mistyped word was meant to be, and knows where a command's help lies."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.commands: Iterable[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(args)
        if self.commands and words and not words[0].startswith("-") and words[0] not in self.commands:
            is_recipe = words[0].partition("/")[0] in [item.name for item in installed.recipes()]
            hint = f"; it is a recipe: grr run {words[0]} ..." if is_recipe else _did_you_mean(words[0], self.commands)
            self.error(f"there is no command {words[0]!r}{hint}")
        options, unknown = super().parse_known_args(words, namespace)
        if "overrides" in options:  # argparse misses those that stand behind an option
            options.overrides += [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-")]
        if unknown:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"it takes no {unknown[0]!r}{_did_you_mean(unknown[0], known)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _parser() -> _Parser:
    parser = _Parser(prog="grr", description=HELP)
    parser.add_argument("--version", action="version", version=__version__)
    every = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(act: Command, name: str, about: str, teach: str, where: Any = every, prog: str = "grr") -> _Parser:
        made: _Parser = where.add_parser(name, help=about, description=f"{about}\n\n{textwrap.dedent(teach).strip()}")
        made.set_defaults(command=act, prog=f"{prog} {name}")
        return made

    one = command(
        commands.ls,
        "ls",
        "List the recipes and configs that are installed.",
        """
        Each with its title. A config is called RECIPE/CONFIG.

          grr ls
          grr ls pretrain evaluate
          grr ls | grep photograph

        Next: grr run pretrain/openmoji
        """,
    )
    one.add_argument("names", metavar="NAME", nargs="*", help="recipes or configs; default: all")

    one = command(
        commands.cp,
        "cp",
        "Copy a recipe with its configs, or one config, to change it.",
        """
        Files are laid out as in the package, so that the commands in their headers work as they stand. Nothing is ever
        overwritten.

          grr cp pretrain                       recipes/pretrain.py and recipes/configs/pretrain/*.yaml
          grr cp pretrain/photos                recipes/configs/pretrain/photos.yaml
          grr cp pretrain/photos mine.yaml      one file to one file
          grr cp pretrain experiment            all below the folder experiment

        Next: grr check recipes/configs/pretrain/photos.yaml data.path=my_photos validation.path=my_photos
        """,
    )
    one.add_argument("name", metavar="NAME", help="as grr ls calls it: pretrain, or pretrain/photos")
    one.add_argument(
        "destination",
        metavar="DESTINATION",
        nargs="?",
        default="recipes",
        help="a folder, or a file that ends in .py or .yaml; default: recipes",
    )

    one = command(
        commands.run,
        "run",
        "Start a recipe that is installed, or a copy of one.",
        """
        What follows the name is the recipe's own: section.key=value, or --help for all of its keys. The same command,
        submitted again, continues where a training run stopped.

          grr run pretrain/openmoji run.epochs=2 run.folder=runs/short
          grr run pretrain --config mine.yaml
          grr run --nproc 4 pretrain/cc12m_grr data.shards='/data/*.tar' validation.shards='/data/*.tar'
          grr run pretrain --help

        On several machines, torchrun starts an installed recipe as a module:

          torchrun --nnodes 2 --nproc_per_node 8 ... -m grr.recipes.pretrain --config mine.yaml

        Next: grr caption runs/openmoji photo.png
        """,
    )
    one.add_argument("--nproc", type=int, metavar="N", help="processes on this machine, one a GPU, by torchrun")
    one.add_argument(
        "name",
        metavar="NAME",
        help="RECIPE, RECIPE/CONFIG, or a file of one's own: a recipe, or a config in a folder configs/RECIPE",
    )
    one.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help="--config FILE, section.key=value ...")

    one = command(
        commands.check,
        "check",
        "Find what is wrong with a config and its data before hours are spent.",
        """
        Every mistake in the config at once; then the data: how much there is, the first samples, images that cannot be
        read, captions that are cut, duplicates, images without captions, and what training and validation share.
        The exit status is 1 if a line is marked with !, and 2 if the config itself holds a mistake.

          grr check pretrain/openmoji
          grr check mine.yaml --recipe pretrain data.path=my_photos validation.path=my_photos
          grr check recipes/configs/pretrain/photos.yaml --all
          grr check --nproc 4 pretrain/cc12m_grr data.shards='/data/*.tar' validation.shards='/data/*.tar'

        Next: grr run pretrain --config mine.yaml
        """,
    )
    one.add_argument("config", metavar="CONFIG", help="a file, or a name that grr ls lists")
    one.add_argument("overrides", metavar="section.key=value", nargs="*", help="instead of what the file says")
    one.add_argument(
        "--recipe", metavar="NAME|FILE", help="whose config it is; default: by its folder, configs/<recipe>/"
    )
    one.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        default=1,
        help="processes of the run, on all machines, which batches must fit; default: 1",
    )
    one.add_argument("--all", action="store_true", help="look at every image and caption, not at a sample")

    about = "Get T5's vocabulary, or train one."
    unless = "A run whose config names no vocabulary trains one by itself."
    tokenizer: Any = every.add_parser("tokenizer", help=about, description=f"{about}\n\n{unless}")
    kinds = tokenizer.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    one = command(
        commands.fetch,
        "fetch",
        "Get T5's vocabulary, the paper's, and verify its checksum.",
        """
        spiece.model of google-t5/t5-base, from a file that you have, or from the Hugging Face hub
        (pip install "grr-coca[hub]").

          grr tokenizer fetch
          grr tokenizer fetch downloads/spiece.model --output data/spiece.model

        Next: grr run pretrain/photos tokenizer.path=spiece.model
        """,
        kinds,
        "grr tokenizer",
    )
    one.add_argument("file", metavar="FILE", nargs="?", help="default: from the hub")
    one.add_argument("--output", metavar="FILE", default="spiece.model", help="default: spiece.model")
    one = command(
        commands.train,
        "train",
        "Train a vocabulary on captions.",
        """
        On text files, a caption a line, or on the data of configs; a config may be followed by section.key=value.

          grr tokenizer train captions.txt --vocab-size 4000 --output mine.model
          grr tokenizer train mine.yaml data.path=my_photos --vocab-size 4000 --output mine.model

        Next: grr run pretrain/photos tokenizer.path=mine.model
        """,
        kinds,
        "grr tokenizer",
    )
    one.add_argument("captions", metavar="CAPTIONS", nargs="+", help="text files, configs, section.key=value")
    one.add_argument("--vocab-size", type=int, metavar="N", required=True, help="ids, at most")
    one.add_argument("--output", metavar="FILE", required=True)
    tokenizer.commands = list(kinds.choices)

    model = "a run's folder, its model/, or one of its checkpoints/step_N"
    images = "files, folders with all that is below them, or globs in quotes"
    one = command(
        commands.caption,
        "caption",
        "Write captions for images with a trained model.",
        """
          grr caption runs/openmoji photo.png
          grr caption runs/openmoji photos 'more/**/*.jpg'

        Of thousands of images, with a page, other ways to write, and going on after a kill:

          grr run caption/default model.path=runs/openmoji run.images=photos

        Next: grr embed runs/openmoji photos --index index
        """,
    )
    one.add_argument("model", metavar="MODEL", help=model)
    one.add_argument("images", metavar="IMAGES", nargs="+", help=images)

    one = command(
        commands.classify,
        "classify",
        "Name what images show, by the names of classes alone.",
        """
          grr classify runs/openmoji photo.png --classes fox,owl,key
          grr classify runs/openmoji photo.png --classes '"crane, a bird", "crane, a machine"'
          grr classify runs/openmoji photos --classes classes.txt --top 1

        With a page, and going on after a kill:

          grr run classify/default model.path=runs/openmoji run.images=photos 'run.classes=[fox, owl, key]'

        Next: grr cp finetune_classifier
        """,
    )
    one.add_argument("model", metavar="MODEL", help=model)
    one.add_argument("images", metavar="IMAGES", nargs="+", help=images)
    one.add_argument(
        "--classes",
        metavar="A,B,C|FILE",
        required=True,
        help="names, those with a comma in double quotes, or a text file of them, one a line",
    )
    one.add_argument("--top", type=int, metavar="N", default=5, help="classes of each image; default: 5")

    one = command(
        commands.embed,
        "embed",
        "Look at images with a trained model, and keep what it saw in an index.",
        """
        Again with other images, it adds them; killed, it goes on.

          grr embed runs/openmoji photos --index index

        Next: grr search index "a fox and a key"
        """,
    )
    one.add_argument("model", metavar="MODEL", help=model)
    one.add_argument("images", metavar="IMAGES", nargs="+", help=images)
    one.add_argument("--index", metavar="FOLDER", default="index", help="default: index")

    one = command(
        commands.search,
        "search",
        "Find images by sentences, or by images that they are like.",
        """
        In an index that grr embed made. A query that is a file is an image.

          grr search index "a fox and a key"
          grr search index "a fox" "an owl" photo.png --top 3

        With a page:

          grr run search/default run.index=index 'run.texts=[a fox and a key]'
        """,
    )
    one.add_argument("index", metavar="INDEX", help="the folder of an index")
    one.add_argument("queries", metavar="QUERY", nargs="+", help="a sentence, or an image's file")
    one.add_argument("--model", metavar="MODEL", help="default: where it lay when the index was made")
    one.add_argument("--top", type=int, metavar="N", default=10, help="images for each query; default: 10")

    parser.commands = list(every.choices)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
