"""Write docs/api.md and tests/grr/public_api.txt from the public names of grr: python docs/make_api.py.

Tests fail where either file differs from what this program writes, so a change of a signature is seen in review.
"""

import ast
import builtins
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import grr

ROOT = Path(__file__).resolve().parents[1]
PAGE, SIGNATURES = ROOT / "docs/api.md", ROOT / "tests/grr/public_api.txt"
SHOWN_DECORATORS = ("contextmanager", "property", "cached_property", "staticmethod", "classmethod", "abstractmethod")
HEAD = """\
# Public names

`import grr` has these names; each is imported when it is first used. `help(grr.load)` prints the whole description of
one. This page is written by `python docs/make_api.py` from signatures and docstrings.

```python
import grr

print(*grr.list_models(), sep=", ")
```

```text
grr_coca, baseline_coca, original_coca, grr_coca_tiny, ...
```
"""


def page() -> str:
    """The content of docs/api.md."""
    parts = [HEAD]
    for section, names in grr._SECTIONS.items():
        parts.append(f"## {section}\n")
        for name, module in names.items():
            value = getattr(grr, name)
            parts.append(f"### grr.{name}\n\n{paragraph(value)}\n\n{textwrap.indent(signature(value), '    ')}")
            parts.append(f"`{module}`\n")
    return "\n".join(parts)


def signatures() -> str:
    """The content of tests/grr/public_api.txt."""
    names = sorted(grr._MODULES, key=str.lower)
    return "\n".join(f"{signature(getattr(grr, name))}" for name in names)


def paragraph(value: Any) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(value) or "").partition("\n\n")[0]


def signature(value: Any) -> str:
    """A function, or a class with its public fields and methods, as in its source without bodies.

    Defaults are their values, and names of Literal types are their choices.
    """
    source = inspect.unwrap(value)
    node = ast.parse(textwrap.dedent(inspect.getsource(source))).body[0]
    names = vars(sys.modules[source.__module__]) | vars(builtins)
    return "\n".join(_lines(node, names)) + "\n"


def _lines(node: ast.stmt, names: dict[str, Any]) -> list[str]:
    if isinstance(node, ast.AnnAssign):
        return [f"{ast.unparse(node.target)}: {_text(node.annotation, names)}"]
    if isinstance(node, ast.ClassDef):
        members = [line for member in node.body if _is_public(member) for line in _lines(member, names)]
        return [f"class {node.name}:", *(f"    {line}" for line in members)]
    assert isinstance(node, ast.FunctionDef)
    shown = [f"@{text}" for d in node.decorator_list if (text := ast.unparse(d)) in SHOWN_DECORATORS]
    arguments = _arguments(node.args, names)
    returns = "" if node.returns is None else f" -> {_text(node.returns, names)}"
    line = f"def {node.name}({', '.join(arguments)}){returns}"
    if len(line) <= 100:
        return [*shown, line]
    return [*shown, f"def {node.name}(", *(f"    {argument}," for argument in arguments), f"){returns}"]


def _arguments(given: ast.arguments, names: dict[str, Any]) -> list[str]:
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    found = [_argument(a, d, names) for a, d in zip(positional, defaults, strict=True)]
    if given.posonlyargs:
        found.insert(len(given.posonlyargs), "/")
    if given.vararg or given.kwonlyargs:
        found.append("*" + (_argument(given.vararg, None, names) if given.vararg else ""))
    found += [_argument(a, d, names) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return found + ([f"**{_argument(given.kwarg, None, names)}"] if given.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None, names: dict[str, Any]) -> str:
    kind = "" if argument.annotation is None else f": {_text(argument.annotation, names)}"
    value = "" if default is None else f" = {eval(ast.unparse(default), names)!r}"
    return argument.arg + kind + (value if kind else value.replace(" ", ""))


def _text(annotation: ast.expr, names: dict[str, Any]) -> str:
    """An annotation as it is written, with the choices of a Literal in the place of its name."""

    class Choices(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            value = names.get(node.id)
            if get_origin(value) is not Literal:
                return node
            return ast.parse(f"Literal[{', '.join(map(repr, get_args(value)))}]", mode="eval").body

    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body  # a forward reference
    return ast.unparse(Choices().visit(annotation))


def _is_public(member: ast.stmt) -> bool:
    if isinstance(member, ast.FunctionDef):
        return member.name == "__init__" or not member.name.startswith("_")
    return isinstance(member, ast.AnnAssign)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SIGNATURES.write_text(signatures(), encoding="utf-8")
