"""The command `grr`: its main function and the list of its commands.

Each command is a pair of functions in a file of this folder: `add_X` declares its arguments and help texts, and the
function below it performs it. A command imports what it needs when it runs, so help and lists do not import torch. It
prints its result, then the command that usually follows, and returns an exit status; it raises ValueError, OSError or
ImportError for what its user can correct.
"""

import sys
from collections.abc import Sequence

from grr import __version__
from grr.cli import hub, models, pack, recipes, scale, sizes, tokenizer
from grr.cli.parser import Act, Parser
from grr.cli.program import attempt

HELP = """\
Train contrastive captioners and use them. The first model trains in minutes on a laptop:

  grr ls                                            list the recipes and configs
  grr run pretrain/openmoji                         train on the built-in pictures; open runs/openmoji/report.html
  grr caption runs/openmoji photo.png               write a caption for an image
  grr embed runs/openmoji photos --index index      embed a folder of images
  grr search index "a fox and a key"                find images by a sentence

pip install "grr-coca[openmoji]" installs the built-in pictures. To train on your own: grr cp pretrain/photos, edit
the file, grr check it, grr run it."""
COMMANDS = (
    recipes.add_ls,
    recipes.add_cp,
    recipes.add_run,
    recipes.add_check,
    pack.add_pack,
    tokenizer.add_tokenizer,
    models.add_caption,
    models.add_classify,
    models.add_embed,
    models.add_search,
    hub.add_models,
    hub.add_push,
    sizes.add_sizes,
    scale.add_scale,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 on success, 1 on failure, 2 if the arguments are wrong."""
    options = build_parser().parse_args((sys.argv[1:] if argv is None else argv) or ["--help"])
    act: Act = options.command

    def import_first() -> None:
        # not at the top: python -m grr.cli.imports, which runs that module, warns if this package has imported it
        from grr.cli.imports import import_modules

        import_modules(options.modules)

    return attempt(import_first, "grr") or attempt(lambda: act(options), options.prog)


def build_parser() -> Parser:
    """Returns the parser of all commands."""
    parser = Parser(prog="grr", description=HELP)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module first, so that builders and data formats which it adds are known by name: the path of a "
        "file or the name of a module; may be repeated",
    )
    parser.add_commands(COMMANDS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
