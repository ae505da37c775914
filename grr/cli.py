"""The command `grr`: recipes, configs, data, vocabularies and trained models, without a line of Python.

A command imports what it needs when it runs, so that help and lists come at once.
"""

import argparse
import difflib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

from grr import installed

Command = Callable[[argparse.Namespace], int]
OVERRIDE = re.compile(r"\w+(\.\w+)+=")
HELP = """\
Train contrastive captioners and use them. From nothing to a model that writes and finds, in minutes on a laptop:

  grr ls                                            what there is to run
  grr run pretrain/openmoji                         train on the built-in pictures; see runs/openmoji/report.html
  grr caption runs/openmoji photo.png               what it says of an image
  grr embed runs/openmoji photos --index index      look at a folder of images
  grr search index "a fox and a key"                find images by a sentence

With pictures of your own: grr cp pretrain/photos, edit it, grr check it, grr run it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Gives the exit status: 0 if it did what was asked, 1 if not, 2 if it was asked wrongly."""
    options = _parser().parse_args((sys.argv[1:] if argv is None else argv) or ["--help"])
    command: Command = options.command
    try:
        return command(options)
    except BrokenPipeError:  # `grr ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 1


# --- recipes and configs -------------------------------------------------------------------------------------------


def ls(options: argparse.Namespace) -> int:
    """List the recipes and configs that are installed."""
    every = [item for recipe in installed.recipes() for item in (recipe, *installed.configs(recipe.name))]
    names = [item.name if item.is_recipe else f"  {item.name}" for item in every]
    width = max(map(len, names)) + 2
    room = max(40, shutil.get_terminal_size((120, 24)).columns - width)
    for name, item in zip(names, every, strict=True):
        print(f"{name:<{width}}{textwrap.shorten(installed.about(item), room, placeholder=' ...')}")
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
    item = _recipe_or_config(options.name)
    words = list(options.words)
    if misplaced := [word for word in words if word.split("=")[0] == "--nproc"]:
        raise ValueError(f"{misplaced[0]} must stand before the name: grr run --nproc 2 {options.name} ...")
    if item.is_recipe:
        recipe, words = item.path, _with_config(item, words)
    else:
        recipe = installed.find(item.name.partition("/")[0]).path
        words = ["--config", str(item.path), *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.nproc}"]
    command = [sys.executable, *(launcher if options.nproc is not None else []), str(recipe), *words]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def check(options: argparse.Namespace) -> int:
    """Tell all that is wrong with a config, and what its data look like."""
    from grr.check import check, read_config, recipe_of

    file = _config_file(options.config)
    script = recipe_of(file, options.recipe)
    cfg, sections = read_config(file, options.overrides, script)
    wrong = 0
    print(f"  {'config':<16}{file}, of {script}: no mistake")
    for finding in check(cfg, sections, every=options.all):
        wrong += finding.wrong
        print(f"{'!' if finding.wrong else ' '} {finding.what:<16}{finding.said}", flush=True)
        for line in finding.shown:
            print(f"  {'':<16}{line}")
    words = " ".join(quote(word) for word in (options.config, *options.overrides))
    if wrong:
        print(f"\n{wrong} {'line' if wrong == 1 else 'lines'} marked ! want your attention; then, grr check {words}")
        return 1
    own = Path(options.config).is_file()
    print(f"\nnothing is wrong; next: grr run {f'{quote(_name_of(script))} --config {words}' if own else words}")
    return 0


# --- vocabularies --------------------------------------------------------------------------------------------------


def fetch(options: argparse.Namespace) -> int:
    """Put T5's vocabulary in its place, if it is whole."""
    from grr.vocabulary import fetch_t5

    print(f"{fetch_t5(options.file, Path(options.output))}: T5's vocabulary, whole")
    print(f"next: grr run pretrain/photos tokenizer.path={quote(options.output)}")
    return 0


def train(options: argparse.Namespace) -> int:
    """Train a vocabulary on captions."""
    from grr.vocabulary import train_vocabulary

    overrides = [word for word in options.captions if OVERRIDE.match(word)]
    sources = [word for word in options.captions if word not in overrides]
    tokenizer = train_vocabulary([_config_file(s) if _is_config(s) else Path(s) for s in sources], overrides,
                                 Path(options.output), vocab_size=options.vocab_size)  # fmt: skip
    print(f"{options.output}: {tokenizer.vocab_size:,} ids")
    print(f"next: grr run pretrain/photos tokenizer.path={quote(options.output)}")
    return 0


# --- trained models ------------------------------------------------------------------------------------------------


def caption(options: argparse.Namespace) -> int:
    """Print a caption of each image, as they come."""
    from grr.captioning import caption_images

    files = _images(options.images)
    return _told(caption_images(_opened(options.model), files), lambda row: str(row["caption"]))


def classify(options: argparse.Namespace) -> int:
    """Print the likeliest classes of each image, as they come."""
    from grr.naming import classify_images, read_classes

    names = options.classes
    file = Path(names)
    classes = read_classes(file) if file.is_file() else [name.strip() for name in names.split(",") if name.strip()]
    files = _images(options.images)
    rows = classify_images(_opened(options.model), files, classes, top=options.top)
    return _told(rows, lambda row: ", ".join(
        f"{name} {p:.1%}" for name, p in zip(row["classes"], row["probabilities"], strict=True)))  # fmt: skip


def embed(options: argparse.Namespace) -> int:
    """Embed images into an index."""
    from grr.index import embed_files
    from grr.results import told

    files = _images(options.images)
    outcome = embed_files(_opened(options.model), files, options.index, options.model, progress=sys.stderr.isatty())
    print(told(outcome, what=f"in {options.index}"))
    if outcome.status == 0:
        print(f'next: grr search {quote(options.index)} "a fox and a key"')
    return outcome.status


def search(options: argparse.Namespace) -> int:
    """Print the images of an index that are nearest to texts, or to images."""
    from grr.index import as_text, look_up, open_index
    from grr.results import printable

    if not Path(options.index, "index.json").is_file():
        raise FileNotFoundError(f"{options.index} is no index of images; make one of a model and a folder of images: "
                                f"grr embed MODEL IMAGES --index {quote(options.index)}")  # fmt: skip
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

    from grr.pretrained import load_pretrained

    return load_pretrained(model, device="cuda" if torch.cuda.is_available() else "cpu")


def _images(words: Iterable[str]) -> list[str]:
    from grr.pictures import find_images

    return list(dict.fromkeys(file for word in words for file in find_images(word)))


def _told(batches: Iterable[list[dict[str, Any]]], said: Callable[[dict[str, Any]], str]) -> int:
    """Print a line for each file; those that cannot be read go to the other stream."""
    from grr.results import printable

    done = 0
    for rows in batches:
        for row in rows:
            name = printable(row["file"])
            if "error" in row:
                print(f"{name} could not be read: {printable(row['error'])}", file=sys.stderr)
            else:
                print(f"{name}: {said(row)}", flush=True)
                done += 1
    return 0 if done else 1


# --- names ---------------------------------------------------------------------------------------------------------


def _recipe_or_config(name: str) -> installed.Item:
    """What is installed under a name, or a recipe's file of one's own."""
    return installed.Item(name, Path(name)) if name.endswith(".py") and Path(name).is_file() else installed.find(name)


def _config_file(name: str) -> Path:
    """A config's file, one's own or the installed one of that name. Raises ValueError if there is neither."""
    if Path(name).is_file():
        return Path(name)
    if name.endswith((".yaml", ".yml")):
        raise ValueError(f"there is no file {name} (grr cp copies a config to begin with, grr ls lists them)")
    item = installed.find(name)
    if item.is_recipe:
        known = ", ".join(config.name for config in installed.configs(name)) or "none is installed"
        raise ValueError(f"{name} is a recipe, a config is wanted: {known}, or a file of your own")
    return item.path


def _is_config(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or (not Path(name).exists() and "/" in name and "." not in name)


def _with_config(recipe: installed.Item, words: list[str]) -> list[str]:
    """The words of a recipe's command line, --config NAME as the file of that name."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in words[:-1]:
        place = words.index("--config") + 1
        return [*words[:place], str(_config_file(words[place])), *words[place + 1 :]]
    known = [config.name for config in installed.configs(recipe.path.stem)]
    if known and not {"-h", "--help"} & set(words):
        raise ValueError(f"{recipe.name} needs a config: grr run {recipe.name} --config FILE, or an installed one, "
                         f"grr run {' or '.join(known)}")  # fmt: skip
    return words


def _name_of(recipe: Path) -> str:
    return recipe.stem if recipe.parent == installed.RECIPES else str(recipe)


# --- the command line ----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """One that guesses what a mistyped word was meant to be, and knows where a command's help lies."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.commands: Iterable[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(args)
        if self.commands and words and not words[0].startswith("-") and words[0] not in self.commands:
            self.error(f"there is no command {words[0]!r}{_did_you_mean(words[0], self.commands)}")
        options, unknown = super().parse_known_args(words, namespace)
        if "overrides" in options:  # argparse misses those that stand behind an option
            options.overrides += [word for word in unknown if OVERRIDE.match(word)]
            unknown = [word for word in unknown if not OVERRIDE.match(word)]
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
    from grr import __version__

    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(act: Command, name: str, about: str, teach: str, where: Any = commands, prog: str = "grr") -> _Parser:
        made: _Parser = where.add_parser(name, help=about, description=f"{about}\n\n{textwrap.dedent(teach).strip()}")
        made.set_defaults(command=act, prog=f"{prog} {name}")
        return made

    one = command(ls, "ls", "List the recipes and configs that are installed.", """
        Each with its first sentence. A config is called RECIPE/CONFIG.

          grr ls
          grr ls | grep photograph

        Next: grr run pretrain/openmoji
        """)  # fmt: skip

    one = command(cp, "cp", "Copy a recipe with its configs, or one config, to change it.", """
        Files are laid out as in the package, so that the commands in their headers work as they stand. Nothing is ever
        overwritten.

          grr cp pretrain                       recipes/pretrain.py and recipes/configs/pretrain/*.yaml
          grr cp pretrain/photos                recipes/configs/pretrain/photos.yaml
          grr cp pretrain/photos mine.yaml      one file to one file
          grr cp pretrain experiment            all below the folder experiment

        Next: grr check recipes/configs/pretrain/photos.yaml data.path=my_photos validation.path=my_photos
        """)  # fmt: skip
    one.add_argument("name", metavar="NAME", help="as grr ls calls it: pretrain, or pretrain/photos")
    one.add_argument("destination", metavar="DESTINATION", nargs="?", default="recipes",
                     help="a folder, or a file that ends in .py or .yaml; default: recipes")  # fmt: skip

    one = command(run, "run", "Start a recipe that is installed, or a copy of one.", """
        What follows the name is the recipe's own: section.key=value, or --help for all of its keys. The same command,
        submitted again, continues where a training run stopped.

          grr run pretrain/openmoji run.epochs=2 run.folder=runs/short
          grr run pretrain --config mine.yaml
          grr run --nproc 4 pretrain/cc12m_grr data.shards='/data/*.tar' validation.shards='/data/*.tar'
          grr run pretrain --help

        On several machines, torchrun starts an installed recipe as a module:

          torchrun --nnodes 2 --nproc_per_node 8 ... -m grr.recipes.pretrain --config mine.yaml

        Next: grr caption runs/openmoji photo.png
        """)  # fmt: skip
    one.add_argument("--nproc", type=int, metavar="N", help="processes on this machine, one a GPU, by torchrun")
    one.add_argument("name", metavar="NAME", help="RECIPE, RECIPE/CONFIG, or a recipe's file")
    one.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help="--config FILE, section.key=value ...")

    one = command(check, "check", "Find what is wrong with a config and its data before hours are spent.", """
        Every mistake in the config at once; then the data: how much there is, the first samples, images that cannot be
        read, captions that are cut, duplicates, images without captions, and what training and validation share.
        The exit status is 1 if a line is marked with !.

          grr check pretrain/openmoji
          grr check mine.yaml --recipe pretrain data.path=my_photos validation.path=my_photos
          grr check recipes/configs/pretrain/photos.yaml --all

        Next: grr run pretrain --config mine.yaml
        """)  # fmt: skip
    one.add_argument("config", metavar="CONFIG", help="a file, or a name that grr ls lists")
    one.add_argument("overrides", metavar="section.key=value", nargs="*", help="instead of what the file says")
    one.add_argument("--recipe", metavar="NAME|FILE",
                     help="whose config it is; default: by its folder, configs/<recipe>/")  # fmt: skip
    one.add_argument("--all", action="store_true", help="look at every image and caption, not at a sample")

    about = "Get T5's vocabulary, or train one."
    unless = "A run whose config names no vocabulary trains one by itself."
    tokenizer: Any = commands.add_parser("tokenizer", help=about, description=f"{about}\n\n{unless}")
    kinds = tokenizer.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    one = command(fetch, "fetch", "Get T5's vocabulary, the paper's, and verify its checksum.", """
        spiece.model of google-t5/t5-base, from a file that you have, or from the Hugging Face hub
        (pip install huggingface_hub).

          grr tokenizer fetch
          grr tokenizer fetch downloads/spiece.model --output data/spiece.model

        Next: grr run pretrain/photos tokenizer.path=spiece.model
        """, kinds, "grr tokenizer")  # fmt: skip
    one.add_argument("file", metavar="FILE", nargs="?", help="default: from the hub")
    one.add_argument("--output", metavar="FILE", default="spiece.model", help="default: spiece.model")
    one = command(train, "train", "Train a vocabulary on captions.", """
        On text files, a caption a line, or on the data of configs; a config may be followed by section.key=value.

          grr tokenizer train captions.txt --vocab-size 4000 --output mine.model
          grr tokenizer train mine.yaml data.path=my_photos --vocab-size 4000 --output mine.model

        Next: grr run pretrain/photos tokenizer.path=mine.model
        """, kinds, "grr tokenizer")  # fmt: skip
    one.add_argument("captions", metavar="CAPTIONS", nargs="+", help="text files, configs, section.key=value")
    one.add_argument("--vocab-size", type=int, metavar="N", required=True, help="ids, at most")
    one.add_argument("--output", metavar="FILE", required=True)
    tokenizer.commands = list(kinds.choices)

    model = "a run's folder, its model/, or one of its checkpoints/step_N"
    images = "files, folders with all that is below them, or globs in quotes"
    one = command(caption, "caption", "Write captions for images with a trained model.", """
          grr caption runs/openmoji photo.png
          grr caption runs/openmoji photos 'more/**/*.jpg'

        Of thousands of images, with a page, other ways to write, and going on after a kill:

          grr run caption/default model.path=runs/openmoji run.images=photos

        Next: grr embed runs/openmoji photos --index index
        """)  # fmt: skip
    one.add_argument("model", metavar="MODEL", help=model)
    one.add_argument("images", metavar="IMAGES", nargs="+", help=images)

    one = command(classify, "classify", "Name what images show, by the names of classes alone.", """
          grr classify runs/openmoji photo.png --classes fox,owl,key
          grr classify runs/openmoji photos --classes classes.txt --top 1

        With a page, and going on after a kill:

          grr run classify/default model.path=runs/openmoji run.images=photos 'run.classes=[fox, owl, key]'

        Next: grr cp finetune_classifier
        """)  # fmt: skip
    one.add_argument("model", metavar="MODEL", help=model)
    one.add_argument("images", metavar="IMAGES", nargs="+", help=images)
    one.add_argument("--classes", metavar="A,B,C|FILE", required=True, help="names, or a text file of them, one a line")
    one.add_argument("--top", type=int, metavar="N", default=5, help="classes of each image; default: 5")

    one = command(embed, "embed", "Look at images with a trained model, and keep what was seen in an index.", """
        Again with other images, it adds them; killed, it goes on.

          grr embed runs/openmoji photos --index index

        Next: grr search index "a fox and a key"
        """)  # fmt: skip
    one.add_argument("model", metavar="MODEL", help=model)
    one.add_argument("images", metavar="IMAGES", nargs="+", help=images)
    one.add_argument("--index", metavar="FOLDER", default="index", help="default: index")

    one = command(search, "search", "Find images by sentences, or by images that they are like.", """
        In an index that grr embed made. A query that is a file is an image.

          grr search index "a fox and a key"
          grr search index "a fox" "an owl" photo.png --top 3

        With a page:

          grr run search/default run.index=index 'run.texts=[a fox and a key]'
        """)  # fmt: skip
    one.add_argument("index", metavar="INDEX", help="the folder of an index")
    one.add_argument("queries", metavar="QUERY", nargs="+", help="a sentence, or an image's file")
    one.add_argument("--model", metavar="MODEL", help="default: where it lay when the index was made")
    one.add_argument("--top", type=int, metavar="N", default=10, help="images for each query; default: 10")

    parser.commands = list(commands.choices)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
