"""The reference of all keys that --help prints."""

import contextlib
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from grr.config.keys import MEANINGS
from grr.config.read import Given
from grr.config.signature import REQUIRED, Section, arguments_of, spelled


def reference(sections: Mapping[str, Section], given: Mapping[str, Given]) -> str:
    """Returns every section with its function, and the value, type and meaning of each key, as YAML.

    The value is the given one, or else the default. Where a section chooses among functions, all keys of the chosen
    function (or the first) are listed, and for the others the keys that differ.
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
    """Returns a line for each key of a function: `key: value  # type, default if other: meaning`."""
    meanings, lines = _meanings(function), []
    for key, (kind, default) in arguments_of(function)[0].items():
        about = spelled(kind)
        shown = values.get(key, default)
        if default is REQUIRED:
            about += ", required"
        elif plain(shown) != plain(default):
            about += f", default {json.dumps(plain(default))}"
        value = "" if shown is REQUIRED else f" {json.dumps(plain(shown), ensure_ascii=False)}"
        meaning = meanings.get(key) or MEANINGS.get(f"{section}.{key}") or MEANINGS.get(key)
        lines.append(f"  {key}:{value}  # {about}" + (f": {meaning}" if meaning else ""))
    return lines


def _meanings(function: Callable[..., Any]) -> dict[str, str]:
    """Returns the meanings in a function's source, by key: Annotated[type, "meaning"], or a comment at the line."""
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


def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
