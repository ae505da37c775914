"""Configs: a YAML section is the keyword arguments of one function, whose signature is the schema.

    SECTIONS: config.Sections = {"run": Run, "model": MODELS, "optimizer": adamw}   # in a recipe, at module level

    cfg = config.load(SECTIONS)
    run = cfg.get(Run)                          # Run(**cfg.run)
    model = cfg.build("model")                  # MODELS[name](**the rest)
    optimizer = adamw(model, **cfg.optimizer)

A section that is a dict of functions is chosen from by its key `name`; it may be left out where `none` is one of them.
Another name on the command line drops the file's arguments that the new function does not take: data.name=folder.
What stands before the `*` of a signature is handed over by code; what stands behind it, and every field of a dataclass,
may be set from YAML or as section.key=value on the command line. Nothing in a config can run code or read the
environment.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

from omegaconf import OmegaConf

from grr.config.check import check_effects, check_section
from grr.config.help import plain, reference
from grr.config.read import COMMAND_LINE, OVERRIDE, ConfigError, Given, Mistakes, collect
from grr.config.signature import Section, Sections

__all__ = ["NONE", "OVERRIDE", "Config", "ConfigError", "Section", "Sections", "load", "nothing", "to_yaml"]

T = TypeVar("T")


def nothing() -> None:
    """Returns None, which is what a section builds that may be left out and is: {"labelled": LABELLED | NONE}."""


NONE: dict[str, Callable[..., Any]] = {"none": nothing}


class Config(SimpleNamespace):
    """The keyword arguments of every section, defaults filled in: plain dicts, `cfg.optimizer["lr"]`.

    Code may change them, `cfg.model |= {"vocab_size": 512}`; `build` and `to_yaml` use the changed values.
    """

    def __init__(self, functions: Sections, sections: Mapping[str, dict[str, Any]]) -> None:
        super().__init__(**sections)
        self._functions = functions

    def get(self, kind: type[T]) -> T:
        """Returns the section whose function is a class, as an object of it: cfg.get(Run) is Run(**cfg.run)."""
        (section,) = (name for name, function in self._functions.items() if function is kind)
        return kind(**vars(self)[section])

    def arguments(self, section: str) -> dict[str, Any]:
        """Returns the keyword arguments of a section without the name of its function."""
        return {key: value for key, value in vars(self)[section].items() if key != "name"}

    def build(self, section: str, *args: Any) -> Any:
        """Call the function of a section with `args` and the keyword arguments of the section."""
        function, arguments = self._functions[section], dict(vars(self)[section])
        if isinstance(function, Mapping):
            function = function[arguments.pop("name")]
        return function(*args, **arguments)


def load(sections: Sections, argv: list[str] | None = None) -> Config:
    """Read `--config FILE section.key=value ...` and check it against the signatures of the sections' functions.

    Without argv, the program's own command line is read. Raises ConfigError with all mistakes at once, each with its
    place; in a recipe, `grr.cli.program.run_main` prints them.
    """
    argv = sys.argv[1:] if argv is None else argv
    wants_help = {"-h", "--help"} & set(argv)
    parser = _Parser(
        usage="%(prog)s --config FILE [section.key=value ...]",
        description=sys.modules["__main__"].__doc__,
        epilog=reference(sections, _given_beside_help(argv, sections)) if wants_help else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="a YAML file of the sections below")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="instead of the file's value")
    options = parser.parse_intermixed_args(argv)

    mistakes = Mistakes()
    given = collect(options.config, options.overrides, sections, mistakes)
    checked = {name: check_section(name, sections[name], given[name], options.config, mistakes) for name in sections}
    check_effects(checked, sections, given, mistakes)
    mistakes.refuse()
    return Config(sections, checked)


def to_yaml(cfg: Config) -> str:
    """Returns the config as YAML that loads as the same config."""
    sections = {name: {key: plain(value) for key, value in vars(cfg)[name].items()} for name in cfg._functions}
    return OmegaConf.to_yaml(OmegaConf.create(sections))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{COMMAND_LINE}:\n  {message}")


def _given_beside_help(argv: list[str], sections: Mapping[str, Section]) -> dict[str, Given]:
    """Returns the values on a command line with --help, as far as they can be read."""
    words = [word for word in argv if word not in ("-h", "--help")]
    if "--config" not in words[:-1]:
        return {}
    file = words[words.index("--config") + 1]
    try:
        return collect(file, [word for word in words if OVERRIDE.match(word)], sections, Mistakes())
    except ConfigError:
        return {}
