"""What a config may set of a function: its keyword arguments, their types and defaults."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

Section = Callable[..., Any] | Mapping[str, Callable[..., Any]]
Sections = Mapping[str, Section]

REQUIRED = object()  # the default of an argument that has none


class Argument(NamedTuple):
    """The type of an argument and its default."""

    kind: Any
    default: Any


def arguments_of(function: Callable[..., Any]) -> tuple[dict[str, Argument], set[str]]:
    """Returns the arguments that a config may set, by name, and the names of those that only code may pass."""
    if dataclasses.is_dataclass(function):
        kinds = get_type_hints(function)
        return {
            field.name: Argument(kinds[field.name], _default(field))
            for field in dataclasses.fields(function)
            if field.init
        }, set()
    arguments, by_code = {}, set()
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind = _bare(parameter.annotation)
        if parameter.kind is parameter.KEYWORD_ONLY and _fits_yaml(kind):
            default = REQUIRED if parameter.default is parameter.empty else parameter.default
            arguments[name] = Argument(kind, default)
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            by_code.add(name)
    return arguments, by_code


def _bare(kind: Any) -> Any:
    """Returns an annotation without the meaning that Annotated adds."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _fits_yaml(kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType, list, tuple):
        return all(_fits_yaml(part) for part in get_args(kind))
    return kind in (int, float, str, bool, Path, None, NoneType, ...) or get_origin(kind) in (Literal, dict)


def spelled(kind: Any) -> str:
    """Returns an annotation as a user of YAML may read it: 'rope' | 'rope_2d', int | null, tuple[float, float]."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(map(spelled, parts))
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin is dict:
        return "mapping"
    if origin in (list, tuple):
        return f"{origin.__name__}[{', '.join('...' if part is ... else spelled(part) for part in parts)}]"
    return {NoneType: "null", None: "null", Path: "path"}.get(kind) or str(kind.__name__)


def words(kind: Any) -> list[str]:
    """Returns the strings that an annotation lists."""
    if get_origin(kind) is Literal:
        return [part for part in get_args(kind) if isinstance(part, str)]
    return [word for part in get_args(kind) for word in words(part)]
