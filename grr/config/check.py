"""Checking a section of a config against the signature of its function."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from grr.config.needs import without_effect
from grr.config.ranges import out_of_range
from grr.config.read import Given, Mistakes
from grr.config.renamed import replacement
from grr.config.signature import REQUIRED, Section, Sections, arguments_of, spelled, words
from grr.config.spelling import did_you_mean


def check_section(section: str, function: Section, given: Given, file: str, mistakes: Mistakes) -> dict[str, Any]:
    """Returns the keyword arguments of a section's function: given values, and defaults for the rest.

    Values that the signature does not allow, and arguments that are missing, are added to `mistakes`.
    """
    result: dict[str, Any] = {}
    if isinstance(function, Mapping):
        name, place = given.pop("name", ("none" if "none" in function and not given else None, file))
        if not isinstance(name, str) or name not in function:
            own = "; grr --import MODULE adds those of your own module"
            got = "" if name is None else f", got {name!r}{did_you_mean(name, function)}{own}"
            mistakes.add(place, f"{section}.name", f"must be one of {', '.join(function)}{got}")
            return result
        result["name"], function = name, function[name]
    who = getattr(function, "__name__", section)
    arguments, by_code = arguments_of(function)
    for key, (value, place) in given.items():
        subject = f"{section}.{key}"
        if key in arguments:
            try:
                result[key] = _fitted(value, arguments[key].kind)
                if why := out_of_range(subject, result[key]):
                    mistakes.add(place, subject, why)
            except ValueError:
                kind = arguments[key].kind
                hint = _in_a_list(value, kind) or did_you_mean(value, words(kind))
                mistakes.add(place, subject, f"{who} wants {spelled(kind)}, got {value!r}{hint}")
        elif key in by_code:
            mistakes.add(place, subject, f"{who} is given this by code, it cannot be set here")
        else:
            hint = replacement(subject) or did_you_mean(key, arguments)
            mistakes.add(place, subject, f"{who} takes no such argument{hint}")
    for key, argument in arguments.items():
        subject = f"{section}.{key}"
        if argument.default is not REQUIRED:
            result.setdefault(key, argument.default)
        elif key not in given and subject not in mistakes.subjects:
            mistakes.add(file, subject, f"{who} needs this argument, {spelled(argument.kind)}")
    if dataclasses.is_dataclass(function) and not any(s.startswith(f"{section}.") for s in mistakes.subjects):
        try:
            function(**result)
        except ValueError as error:
            place = next((place for key, (_, place) in given.items() if key in str(error)), file)
            mistakes.add(place, section, str(error))
    return {key: result[key] for key in ("name", *arguments) if key in result}


def check_effects(
    checked: Mapping[str, Mapping[str, Any]], functions: Sections, given: Mapping[str, Given], mistakes: Mistakes
) -> None:
    """Add to `mistakes` the given options that another option leaves without effect. checked: a config's sections."""
    changed = set()
    for section, values in checked.items():
        function = functions[section]
        if isinstance(function, Mapping):
            if "name" not in values:  # a mistake already
                continue
            function = function[values["name"]]
        arguments, _ = arguments_of(function)
        known = given[section].keys() & arguments.keys() & values.keys()
        changed |= {f"{section}.{key}" for key in known if values[key] != arguments[key].default}
    for subject, why in without_effect(checked, changed):
        section, key = subject.split(".")
        mistakes.add(given[section][key][1], subject, why)


def _in_a_list(value: Any, kind: Any) -> str:
    """Returns the hint to write a value in brackets, if a list of it alone would fit."""
    with contextlib.suppress(ValueError):
        _fitted([value], kind)
        return f"; write [{value}]"
    return ""


def _fitted(value: Any, kind: Any) -> Any:
    """Convert a value to a type: a list to a tuple, an int to a float. Raises ValueError if it does not fit."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            with contextlib.suppress(ValueError):
                return _fitted(value, part)
    elif origin is Literal:
        for part in parts:
            if type(value) is type(part) and value == part:  # True is not 1
                return value
    elif (origin is list or parts[-1:] == (...,)) and parts[0] is str and isinstance(value, str):
        # run.texts="a man, standing", which is one text; in brackets YAML splits it at the comma
        return origin([value])
    elif origin in (list, tuple) and isinstance(value, list):
        if origin is list or parts[-1] is ...:
            return origin(_fitted(item, parts[0]) for item in value)
        return tuple(_fitted(item, part) for item, part in zip(value, parts, strict=True))
    elif origin is dict and isinstance(value, dict):
        return value
    elif kind is float and type(value) in (int, float):
        if not math.isnan(value):
            return float(value)
    elif kind is Path and type(value) is str:
        return Path(value)
    elif type(value) is kind or (value is None and kind in (None, NoneType)):
        return value
    raise ValueError(f"config: {value!r} is not {spelled(kind)}")
