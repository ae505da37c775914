"""Reading a config: a YAML file and the command line, with the place that each value is from."""

import re
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from grr.config.signature import Section, arguments_of
from grr.config.spelling import did_you_mean

COMMAND_LINE = "command line"
OVERRIDE = re.compile(r"\w+(\.\w+)+=")  # section.key=...
PLAIN = re.compile(r"\$\{[A-Za-z_]\w*(\.\w+)*\}")  # ${section.key}
Given = dict[str, tuple[Any, str]]  # key -> what was given, and the place it was read from


class ConfigError(ValueError):
    """All mistakes of a config, a line each, by the place that they were read from."""


class Mistakes:
    """The mistakes that were found so far, by the place that they were read from."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}
        self.subjects: set[str] = set()

    def add(self, place: str, subject: str, why: str) -> None:
        self.lines.setdefault(place, []).append(f"  {subject}: {why}")
        self.subjects.add(subject)

    def refuse(self) -> None:
        if self.lines:
            raise ConfigError("\n".join("\n".join([f"{place}:", *lines]) for place, lines in self.lines.items()))


def collect(file: str, words: list[str], sections: Mapping[str, Section], mistakes: Mistakes) -> dict[str, Given]:
    """Returns the values of each section in a file and on the command line, which takes precedence."""
    given: dict[str, Given] = {section: {} for section in sections}
    _gather(file, _read(file), given, mistakes)
    overrides = _parse(words, mistakes)
    _drop_arguments_of_other_names(overrides, given, sections)
    _gather(COMMAND_LINE, overrides, given, mistakes)
    _interpolate(given, mistakes)
    return given


def _read(file: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except FileNotFoundError:
        raise ConfigError(f"{file}:\n  there is no file {file}; grr ls lists the installed configs") from None
    except OSError as error:
        raise ConfigError(f"{file}:\n  cannot be read: {error.strerror}; name a YAML file") from None
    except (UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}:\n  cannot be read as YAML: {_one_line(error)}") from None


def _parse(overrides: list[str], mistakes: Mistakes) -> Any:
    """Returns the sections of `section.key=value` words, each value read as YAML."""
    result = OmegaConf.create()
    for override in overrides:
        if not OVERRIDE.match(override):
            mistakes.add(COMMAND_LINE, override, "must be section.key=value")
            continue
        try:
            result.merge_with_dotlist([override])
        except (YAMLError, OmegaConfBaseException) as error:
            mistakes.add(COMMAND_LINE, override, f"cannot be read as YAML: {_one_line(error)}")
    return OmegaConf.to_container(result, resolve=False)


def _gather(place: str, source: Any, given: dict[str, Given], mistakes: Mistakes) -> None:
    """Add the values of one place to those given so far, and replace those of the same keys."""
    if not isinstance(source, dict):
        raise ConfigError(f"{place}:\n  must be sections of `key: value`, got a {type(source).__name__}")
    for section, values in source.items():
        if section not in given:
            mistakes.add(place, section, f"there is no such section{did_you_mean(section, given)}")
        elif not isinstance(values, dict | NoneType):
            mistakes.add(place, section, f"must be a section of `key: value`, got {values!r}")
        else:
            given[section] |= {str(key): (value, place) for key, value in (values or {}).items()}


def _drop_arguments_of_other_names(
    overrides: dict[Any, Any], given: dict[str, Given], sections: Mapping[str, Section]
) -> None:
    """Where the command line names another function than the file, drop the arguments of the file's function alone."""
    for section, values in overrides.items():
        functions, name = sections.get(section), values.get("name") if isinstance(values, dict) else None
        before, _ = given.get(section, {}).get("name", (None, ""))
        if isinstance(functions, Mapping) and all(isinstance(x, str) and x in functions for x in (name, before)):
            only_before = arguments_of(functions[before])[0].keys() - arguments_of(functions[str(name)])[0].keys()
            for key in only_before & given[section].keys():
                del given[section][key]


def _interpolate(given: dict[str, Given], mistakes: Mistakes) -> None:
    """Replace ${section.key} by the value of that key.

    OmegaConf's resolvers are refused, oc.env too: a token of the environment would be saved with the run, and one file
    would mean two things on two machines. The shell can expand a variable on the command line: run.folder=$SCRATCH/run.
    """
    for section, values in given.items():
        for key, (value, place) in list(values.items()):
            if any("${" in PLAIN.sub("", text) for text in _texts(value)):
                mistakes.add(place, f"{section}.{key}", f"only ${{section.key}} can be filled in, got {value!r}")
                del values[key]
    tree = OmegaConf.create({s: {key: value for key, (value, _) in values.items()} for s, values in given.items()})
    for section, values in given.items():
        for key, (_, place) in list(values.items()):
            try:
                node = tree[section][key]
                values[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node, place
            except OmegaConfBaseException as error:
                mistakes.add(place, f"{section}.{key}", str(error).splitlines()[0])
                del values[key]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
