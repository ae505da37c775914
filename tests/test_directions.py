"""One direction: components import torch, grr imports components, recipes import what is installed."""

import ast
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.py")} | {"recipes"}
INSTALLED = packages_distributions().keys() - RECIPES - {"components"}


def component_may_import(name: str) -> bool:
    """The standard library, torch, and neighbours, those by relative names: so that a file can be lifted out."""
    return _top(name) in sys.stdlib_module_names | {"torch"} or (name.startswith(".") and not name.startswith(".."))


def library_may_import(name: str) -> bool:
    """Anything but recipes, under whatever name, and the bare name of components."""
    return "recipes" not in name.split(".") and _top(name) != "components"


def recipe_may_import(name: str) -> bool:
    """Installed packages, grr among them, but no recipe: so that a copy runs in an empty folder."""
    return _top(name) in sys.stdlib_module_names | INSTALLED | {"grr"} and "recipes" not in name.split(".")


def imports(source: str) -> Iterator[str]:
    """Every name that a file imports, wherever in it, with what it takes from there: torch.Tensor, .norms.RMSNorm."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (start + alias.name for alias in node.names)


def _top(name: str) -> str:
    return name.split(".")[0]


def library_files() -> list[Path]:
    """The modules of grr/, without the two links."""
    files = (ROOT / "grr").rglob("*.py")
    return [path for path in files if path.relative_to(ROOT).parts[1] not in ("components", "recipes")]


@pytest.mark.parametrize(
    ("files", "may_import"),
    [
        (list((ROOT / "components").glob("*.py")), component_may_import),
        (library_files(), library_may_import),
        (list((ROOT / "recipes").glob("*.py")), recipe_may_import),
    ],
    ids=["components", "grr", "recipes"],
)
def test_nothing_is_imported_against_the_direction(files: list[Path], may_import: Callable[[str], bool]):
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imports(path.read_text())
        if not may_import(name)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("may_import", "allowed", "refused"),
    [
        (
            component_may_import,
            ["import math", "import torch.nn.functional as F", "from .norms import RMSNorm"],
            [
                "import numpy",
                "from grr.data.images import normalize",
                "from ..images import normalize",
                "from .. import model",
                "import components.norms",
                "def f():\n    import grr",
            ],
        ),
        (
            library_may_import,
            ["from grr.components import Block", "import numpy", "from .images import normalize"],
            [
                "import recipes.pretrain",
                "from grr import recipes",
                "from grr.recipes.pretrain import Run",
                "from ..recipes import pretrain",
                "from . import recipes",
                "import components",
            ],
        ),
        (
            recipe_may_import,
            ["from grr.training.optim import adamw", "import torch.distributed", "from pathlib import Path"],
            [
                "from pretrain import Run",
                "from .pretrain import Run",
                "import recipes",
                "from grr.recipes import pretrain",
                "from components import Block",
                "from a_helper_beside_it import f",
            ],
        ),
    ],
)
def test_a_wrong_import_would_be_seen(may_import: Callable[[str], bool], allowed: list[str], refused: list[str]):
    seen = {source: all(map(may_import, imports(source))) for source in allowed + refused}
    assert [source for source, fine in seen.items() if fine] == allowed


def test_there_is_something_to_look_at():
    assert (ROOT / "components" / "attention.py").is_file()
    assert ROOT / "grr" / "models" / "coca.py" in library_files()


def waits_without_a_deadline(source: str) -> Iterator[int]:
    """The lines of calls that wait for another process or thread without a timeout, and of loops that sleep without
    a deadline."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            runs = ast.unparse(node.func) in ("subprocess.run", "subprocess.check_call", "subprocess.check_output")
            waits = node.func.attr in ("communicate", "wait") and not node.args
            if (runs or waits) and "timeout" not in {argument.arg for argument in node.keywords}:
                yield node.lineno
        elif isinstance(node, ast.While) and "time.sleep(" in (text := ast.unparse(node)) and "deadline" not in text:
            yield node.lineno


def test_whatever_waits_has_a_deadline():
    """The grid of recipes/sweep.py alone waits without one, for trainings, however long they take."""
    files = [*(ROOT / "components").glob("*.py"), *library_files(), *(ROOT / "tests").rglob("*.py")]
    files += [path for path in (ROOT / "recipes").glob("*.py") if path.name != "sweep.py"]
    found = {str(path.relative_to(ROOT)): list(waits_without_a_deadline(path.read_text())) for path in files}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(['a'], check=True)",
        "process.communicate()[0]",
        "process.wait()",
        "barrier.wait()",
        "while not done():\n    time.sleep(1)",
    ],
)
def test_a_wait_without_a_deadline_would_be_seen(source: str):
    assert list(waits_without_a_deadline(source)) == [1]
