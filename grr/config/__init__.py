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
import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import math
import re
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from grr.config.keys import MEANINGS
from grr.config.ranges import out_of_range
from grr.config.renamed import replacement

Section = Callable[..., Any] | Mapping[str, Callable[..., Any]]
Sections = Mapping[str, Section]
T = TypeVar("T")

COMMAND_LINE = "command line"
REQUIRED = object()  # the default of an argument that has none
OVERRIDE = re.compile(r"\w+(\.\w+)+=")  # section.key=...
PLAIN = re.compile(r"\$\{[A-Za-z_]\w*(\.\w+)*\}")  # ${section.key}


def nothing() -> None:
    """Returns None, which is what a section builds that may be left out and is: {"labelled": LABELLED | NONE}."""


NONE: dict[str, Callable[..., Any]] = {"none": nothing}


class ConfigError(ValueError):
    """All that is wrong with a config, a line each under the place it was read from."""


class Config(SimpleNamespace):
    """The keyword arguments of every section, defaults filled in: plain dicts, `cfg.optimizer["lr"]`.

    They may be changed by code, `cfg.model |= {"vocab_size": 512}`; what is built and saved is what stands in them.
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
        epilog=_reference(sections, _given_beside_help(argv, sections)) if wants_help else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="a YAML file of the sections below")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="instead of the file's value")
    options = parser.parse_intermixed_args(argv)

    mistakes = _Mistakes()
    given = _collect(options.config, options.overrides, sections, mistakes)
    checked = {name: _check(name, sections[name], given[name], options.config, mistakes) for name in sections}
    mistakes.refuse()
    return Config(sections, checked)


def save(cfg: Config, path: Path) -> None:
    """Write the config as YAML that loads as the same config. Whole or not at all: written aside, then renamed."""
    plain = {section: {key: _plain(value) for key, value in vars(cfg)[section].items()} for section in cfg._functions}
    aside = path.with_suffix(".tmp")
    aside.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)), encoding="utf-8")
    aside.replace(path)


# --- reading -------------------------------------------------------------------------------------------------------

Given = dict[str, tuple[Any, str]]  # key -> what was given, and the place it was read from


class _Mistakes:
    """What was found wrong so far, by the place it was read from."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}
        self.subjects: set[str] = set()

    def add(self, place: str, subject: str, why: str) -> None:
        self.lines.setdefault(place, []).append(f"  {subject}: {why}")
        self.subjects.add(subject)

    def refuse(self) -> None:
        if self.lines:
            raise ConfigError("\n".join("\n".join([f"{place}:", *lines]) for place, lines in self.lines.items()))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{COMMAND_LINE}:\n  {message}")


def _collect(file: str, words: list[str], sections: Mapping[str, Section], mistakes: _Mistakes) -> dict[str, Given]:
    """What a file and the command line say, of each section."""
    given: dict[str, Given] = {section: {} for section in sections}
    _gather(file, _read(file), given, mistakes)
    overrides = _parse(words, mistakes)
    _drop_arguments_of_other_names(overrides, given, sections)
    _gather(COMMAND_LINE, overrides, given, mistakes)
    _interpolate(given, mistakes)
    return given


def _given_beside_help(argv: list[str], sections: Mapping[str, Section]) -> dict[str, Given]:
    """What stands on the command line beside --help, as far as it can be read."""
    words = [word for word in argv if word not in ("-h", "--help")]
    if "--config" not in words[:-1]:
        return {}
    file = words[words.index("--config") + 1]
    try:
        return _collect(file, [word for word in words if OVERRIDE.match(word)], sections, _Mistakes())
    except ConfigError:
        return {}


def _read(file: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}:\n  cannot be read as YAML: {_one_line(error)}") from None


def _parse(overrides: list[str], mistakes: _Mistakes) -> Any:
    """section.key=value, the value read as YAML."""
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


def _gather(place: str, source: Any, given: dict[str, Given], mistakes: _Mistakes) -> None:
    """Lay what one place says over what is given so far."""
    if not isinstance(source, dict):
        raise ConfigError(f"{place}:\n  must be sections of `key: value`, got a {type(source).__name__}")
    for section, values in source.items():
        if section not in given:
            mistakes.add(place, section, f"there is no such section{_did_you_mean(section, given)}")
        elif not isinstance(values, dict | NoneType):
            mistakes.add(place, section, f"must be a section of `key: value`, got {values!r}")
        else:
            given[section] |= {str(key): (value, place) for key, value in (values or {}).items()}


def _drop_arguments_of_other_names(
    overrides: dict[Any, Any], given: dict[str, Given], sections: Mapping[str, Section]
) -> None:
    """Where the command line names another function than the file did, drop what only the file's function takes."""
    for section, values in overrides.items():
        functions, name = sections.get(section), values.get("name") if isinstance(values, dict) else None
        before, _ = given.get(section, {}).get("name", (None, ""))
        if isinstance(functions, Mapping) and all(isinstance(x, str) and x in functions for x in (name, before)):
            only_before = _arguments(functions[before])[0].keys() - _arguments(functions[str(name)])[0].keys()
            for key in only_before & given[section].keys():
                del given[section][key]


def _interpolate(given: dict[str, Given], mistakes: _Mistakes) -> None:
    """Replace ${section.key} by what stands there.

    OmegaConf's resolvers are refused, oc.env too: a token of the environment would be saved with the run, and one file
    would mean two things on two machines. The shell can do it in sight, on the command line: run.folder=$SCRATCH/run.
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


# --- checking ------------------------------------------------------------------------------------------------------


class _Argument(NamedTuple):
    kind: Any
    default: Any


def _check(section: str, function: Section, given: Given, file: str, mistakes: _Mistakes) -> dict[str, Any]:
    """The keyword arguments of a section's function: what is given, if it may be, and defaults for the rest."""
    result: dict[str, Any] = {}
    if isinstance(function, Mapping):
        name, place = given.pop("name", ("none" if "none" in function and not given else None, file))
        if not isinstance(name, str) or name not in function:
            own = "; grr --import MODULE adds those of your own module"
            got = "" if name is None else f", got {name!r}{_did_you_mean(name, function)}{own}"
            mistakes.add(place, f"{section}.name", f"must be one of {', '.join(function)}{got}")
            return result
        result["name"], function = name, function[name]
    who = getattr(function, "__name__", section)
    arguments, by_code = _arguments(function)
    for key, (value, place) in given.items():
        subject = f"{section}.{key}"
        if key in arguments:
            try:
                result[key] = _fitted(value, arguments[key].kind)
                if why := out_of_range(subject, result[key]):
                    mistakes.add(place, subject, why)
            except ValueError:
                kind = arguments[key].kind
                why = f"{who} wants {_spelled(kind)}, got {value!r}{_did_you_mean(value, _words(kind))}"
                mistakes.add(place, subject, why)
        elif key in by_code:
            mistakes.add(place, subject, f"{who} is given this by code, it cannot be set here")
        else:
            hint = replacement(subject) or _did_you_mean(key, arguments)
            mistakes.add(place, subject, f"{who} takes no such argument{hint}")
    for key, argument in arguments.items():
        subject = f"{section}.{key}"
        if argument.default is not REQUIRED:
            result.setdefault(key, argument.default)
        elif key not in given and subject not in mistakes.subjects:
            mistakes.add(file, subject, f"{who} needs this argument, {_spelled(argument.kind)}")
    if dataclasses.is_dataclass(function) and not any(s.startswith(f"{section}.") for s in mistakes.subjects):
        try:
            function(**result)
        except ValueError as error:
            place = next((place for key, (_, place) in given.items() if key in str(error)), file)
            mistakes.add(place, section, str(error))
    return {key: result[key] for key in ("name", *arguments) if key in result}


def _arguments(function: Callable[..., Any]) -> tuple[dict[str, _Argument], set[str]]:
    """What a config may set, and the names of what only code may."""
    if dataclasses.is_dataclass(function):
        kinds = get_type_hints(function)
        return {
            field.name: _Argument(kinds[field.name], _default(field))
            for field in dataclasses.fields(function)
            if field.init
        }, set()
    arguments, by_code = {}, set()
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind = _bare(parameter.annotation)
        if parameter.kind is parameter.KEYWORD_ONLY and _fits_yaml(kind):
            default = REQUIRED if parameter.default is parameter.empty else parameter.default
            arguments[name] = _Argument(kind, default)
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            by_code.add(name)
    return arguments, by_code


def _bare(kind: Any) -> Any:
    """An annotation without the meaning that Annotated adds."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _fits_yaml(kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType, list, tuple):
        return all(_fits_yaml(part) for part in get_args(kind))
    return kind in (int, float, str, bool, Path, None, NoneType, ...) or get_origin(kind) is Literal


def _fitted(value: Any, kind: Any) -> Any:
    """The value, as the annotation has it: a list becomes a tuple, an int a float. Raises ValueError if it cannot."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            with contextlib.suppress(ValueError):
                return _fitted(value, part)
    elif origin is Literal:
        for part in parts:
            if type(value) is type(part) and value == part:  # True is not 1
                return value
    elif origin is list and parts[0] is str and isinstance(value, str):
        return [value]  # run.texts="a man, standing", which is one text; in brackets YAML splits it at the comma
    elif origin in (list, tuple) and isinstance(value, list):
        if origin is list or parts[-1] is ...:
            return origin(_fitted(item, parts[0]) for item in value)
        return tuple(_fitted(item, part) for item, part in zip(value, parts, strict=True))
    elif kind is float and type(value) in (int, float):
        if not math.isnan(value):
            return float(value)
    elif kind is Path and type(value) is str:
        return Path(value)
    elif type(value) is kind or (value is None and kind in (None, NoneType)):
        return value
    raise ValueError(f"config: {value!r} is not {_spelled(kind)}")


# --- wording -------------------------------------------------------------------------------------------------------


def _spelled(kind: Any) -> str:
    """An annotation as a user of YAML may read it: 'rope' | 'rope_2d', int | null, tuple[float, float]."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(map(_spelled, parts))
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (list, tuple):
        return f"{origin.__name__}[{', '.join('...' if part is ... else _spelled(part) for part in parts)}]"
    return {NoneType: "null", None: "null", Path: "path"}.get(kind) or str(kind.__name__)


def _words(kind: Any) -> list[str]:
    """The strings that an annotation lists."""
    if get_origin(kind) is Literal:
        return [part for part in get_args(kind) if isinstance(part, str)]
    return [word for part in get_args(kind) for word in _words(part)]


def _did_you_mean(word: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _reference(sections: Mapping[str, Section], given: Mapping[str, Given]) -> str:
    """Every section with its function, and of each key the value, type and meaning, as YAML.

    The value is what is given, or else the default. Of a choice, all keys of the chosen function, or of the first, and
    of the others those that it has not.
    """
    lines = []
    for section, function in sections.items():
        values = {key: value for key, (value, _) in given.get(section, {}).items()}
        if isinstance(function, Mapping):
            name = values.get("name")
            chosen = str(name) if isinstance(name, str) and name in function else next(iter(function))
            lines.append(f"\n{section}:  # one of these functions, by name; another name keeps the keys that both take")
            lines.append(f"  name: {chosen}  # {_first_line(function[chosen])}")
            lines += _shown(section, function[chosen], values)
            same = _shown(section, function[chosen], {})
            for other in (name for name in function if name != chosen):
                lines.append(f"  name: {other}  # {_first_line(function[other])}")
                lines += [f"  {line}" for line in _shown(section, function[other], {}) if line not in same]
        else:
            lines.append(f"\n{section}:  # {getattr(function, '__name__', section)}: {_first_line(function)}")
            lines += _shown(section, function, values)
    return "\n".join(lines)


def _shown(section: str, function: Callable[..., Any], values: Mapping[str, Any]) -> list[str]:
    """A line for each key of a function: `key: value  # type, default if other: meaning`."""
    meanings, lines = _meanings(function), []
    for key, (kind, default) in _arguments(function)[0].items():
        about = _spelled(kind)
        shown = values.get(key, default)
        if default is REQUIRED:
            about += ", required"
        elif _plain(shown) != _plain(default):
            about += f", default {json.dumps(_plain(default))}"
        value = "" if shown is REQUIRED else f" {json.dumps(_plain(shown), ensure_ascii=False)}"
        meaning = meanings.get(key) or MEANINGS.get(f"{section}.{key}") or MEANINGS.get(key)
        lines.append(f"  {key}:{value}  # {about}" + (f": {meaning}" if meaning else ""))
    return lines


def _meanings(function: Callable[..., Any]) -> dict[str, str]:
    """What is written of a function's keys where they stand: Annotated[type, "meaning"], or a comment in its line."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError, TypeError):  # there is no source
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        annotated: list[str] = []
        before = ""
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in (tokenize.NL, tokenize.NEWLINE):
                annotated = []
            elif token.string == ":" and before.isidentifier():
                annotated.append(before)
            elif token.type == tokenize.COMMENT and len(annotated) == 1 and not token.string.startswith("# fmt:"):
                found[annotated[0]] = token.string.lstrip("# ")
            before = token.string
    with contextlib.suppress(TypeError):
        for key, kind in get_type_hints(function, include_extras=True).items():
            if texts := [text for text in getattr(kind, "__metadata__", ()) if isinstance(text, str)]:
                found[key] = texts[0]
    return found


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
