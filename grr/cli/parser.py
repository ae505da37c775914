"""Argument parser of the command `grr`: subcommands, spelling suggestions and help texts."""

import argparse
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from grr.config.spelling import did_you_mean
from grr.experiments import catalog

Act = Callable[[argparse.Namespace], int]  # performs a command and returns the exit status


class Parser(argparse.ArgumentParser):
    """ArgumentParser that suggests the nearest known command or option for an unknown one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.commands: Sequence[str] = ()

    def add_commands(self, adders: Iterable[Callable[[Any], None]]) -> None:
        """Give this parser subcommands; each adder calls `add_command` on the subparsers that it receives."""
        subparsers = self.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
        for add in adders:
            add(subparsers)
        self.commands = list(subparsers.choices)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(args)
        if self.commands and words and not words[0].startswith("-") and words[0] not in self.commands:
            is_recipe = words[0].partition("/")[0] in [item.name for item in catalog.recipes()]
            hint = f"; it is a recipe: grr run {words[0]} ..." if is_recipe else did_you_mean(words[0], self.commands)
            self.error(f"there is no command {words[0]!r}{hint}")
        options, unknown = super().parse_known_args(words, namespace)
        if "overrides" in options:  # argparse does not assign those that follow an option
            options.overrides += [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-")]
        if unknown:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"it takes no {unknown[0]!r}{did_you_mean(unknown[0].partition('=')[0], known)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[\w-]+): must ", r"\1 must ", message)  # of `count` and `integer`
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def integer(word: str) -> int:
    """Read a number as the type of an argument whose range the command checks."""
    if not word.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {word}")
    return int(word)


def count(word: str) -> int:
    """Read a number from 1 on, as the type of an argument."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {word}")
    return int(word)


def add_command(subparsers: Any, act: Act, name: str, summary: str, details: str) -> Parser:
    """Add a command to the subparsers of `Parser.add_commands`. Returns its parser, to which arguments are added.

    summary: one line for the list of commands. details: examples and the next command, for the command's own help.
    """
    text = f"{summary}\n\n{textwrap.dedent(details).strip()}"
    parser: Parser = subparsers.add_parser(name, help=summary, description=text)
    parser.set_defaults(command=act, prog=parser.prog)
    return parser
