"""CONTRIBUTING.md lists every private name of torch and of other libraries that the source uses, with a test of it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKS = (ROOT / "grr/components", ROOT / "grr/recipes")
SOURCES = [
    path
    for folder in ("components", "grr", "recipes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(path.is_relative_to(link) for link in LINKS)
]
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}  # of named tuples and os, by Python's documentation
PRIVATE = re.compile(r"_[A-Za-z]\w*")
IN_A_MODULE = re.compile(r"[a-z]\w*(\.\w+)*\._[a-z]\w*(\.\w+)*")
ROW = re.compile(r"^\| `([\w.]+)` \| .+ \| `(tests/[\w/]+\.py)::(\w+)` \|$", re.MULTILINE)


def own_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file defines: functions, classes, variables, and attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(dotted: str) -> bool:
    return any(PRIVATE.fullmatch(part) for part in dotted.split("."))


def private_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Yield the private names that a file takes from elsewhere: imports, attributes, and names in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.ImportFrom):
            yield from (name for a in node.names if is_private(name := f"{node.module}.{a.name}"))
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and not is_self(node.value):
            dotted = ast.unparse(node)
            if dotted.startswith("torch."):
                yield dotted
            elif node.attr not in own | PUBLIC:
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            yield from (x.value for x in node.args if isinstance(x, ast.Constant) and PRIVATE.fullmatch(str(x.value)))
        elif isinstance(node, ast.Set | ast.Tuple):
            texts = [x.value for x in node.elts if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            yield from (x for x in texts if (PRIVATE.fullmatch(x) and x not in own) or IN_A_MODULE.fullmatch(x))


def used() -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    own = {name for tree in trees for name in own_names(tree)}
    return {name for tree in trees for name in private_names(tree, own) if not name.startswith("grr.")}


def listed() -> dict[str, tuple[Path, str]]:
    """The rows of the table: a name, and the file and the name of its test."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {name: (ROOT / file, test) for name, file, test in ROW.findall(text)}


def test_the_table_lists_exactly_the_private_names_that_are_used():
    assert sorted(listed()) == sorted(used())


def test_every_test_of_the_table_exists():
    for file, test in listed().values():
        names = {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
        assert test in names, f"{file.relative_to(ROOT)}::{test}"


def test_private_names_are_found_in_every_form():
    source = """
from torch._x import y
from torch.a import _b
import c._d
torch.e._f(1)
module._g.h
self._own, cls._own, module._own, output._replace(x=1)
getattr(x, "_i", None)
NAMES = {"_j", "_k ", "torch.l._m"}
from grr.n import _o
"""
    found = set(private_names(ast.parse(source), {"_own"}))
    assert found == {"torch._x.y", "torch.a._b", "c._d", "torch.e._f", "_g", "_i", "_j", "torch.l._m", "grr.n._o"}
