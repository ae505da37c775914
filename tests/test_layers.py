"""Imports go down a declared order of layers, and modules wait with a deadline.

components import torch alone; a room of grr imports itself and the rooms below it; recipes import what is installed.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (  # of grr/, the lowest first: each imports itself and those before it, wherever in a file the import stands
    "components",
    "config",
    "files",
    "seeds",
    "tokenizers",
    "data",
    "models",
    "parallel",
    "training",
    "checkpoint",
    "generation",
    "evaluation",
    "inference",
    "export",
    "experiments",
    "reports",
    "cli",
)
PUBLIC = ("__init__", "__main__", "builders")  # files of grr/ that import any layer, on demand or to start the command
LINKS = ("components", "recipes")
MOST_ENTRIES, MOST_FILES = 17, 15  # of grr/ beside __init__.py, __main__.py, whose name and place Python decides,
# py.typed and the links; of a folder in it
RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.py")} | {"recipes"}
INSTALLED = packages_distributions().keys() - RECIPES - {"components"}


def wrong_imports(file: str, source: str) -> Iterator[str]:
    """The imports of a file that its place in the repository forbids, each with the rule."""
    folder, _, rest = file.partition("/")
    package = file.removesuffix(".py").split("/")[:-1]
    for name in imports(source):
        if folder == "components":
            rule, fine = "components import torch, and their neighbours by relative names", component_may_import(name)
        elif folder == "recipes":
            rule, fine = "a recipe imports installed packages, and no other recipe", recipe_may_import(name)
        else:
            room = rest.partition("/")[0].removesuffix(".py")
            below = LAYERS[: LAYERS.index(room) + 1] if room in LAYERS else (*LAYERS, "builders")
            rule, fine = f"{room} imports {', '.join(below)}", library_may_import(absolute(name, package), below)
        if not fine:
            yield f"{file} imports {name}; {rule}"


def component_may_import(name: str) -> bool:
    """The standard library, torch, and neighbours, those by relative names: so that a file can be lifted out."""
    return _top(name) in sys.stdlib_module_names | {"torch"} or (name.startswith(".") and not name.startswith(".."))


def library_may_import(name: str, below: tuple[str, ...]) -> bool:
    """Rooms that are not above, and installed packages: no recipe, no bare components, no name of the public face."""
    if _top(name) != "grr":
        return "recipes" not in name.split(".") and _top(name) != "components"
    return name in ("grr", "grr.__version__") or name.split(".")[1] in below


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


def absolute(name: str, package: list[str]) -> str:
    """A name that a module of this package imports, without leading dots."""
    plain = name.lstrip(".")
    dots = len(name) - len(plain)
    return ".".join([*package[: len(package) - dots + 1], plain]) if dots else name


def cycle(sources: dict[str, str]) -> list[str]:
    """The modules of an import cycle among files of grr/, given by path; an empty list if there is none."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        parts = [absolute(name, path.split("/")[:-1]).split(".") for name in imports(sources[path])]
        prefixes = [[".".join(name[:i]) for i in range(len(name), 1, -1)] for name in parts]
        imported = [next((prefix for prefix in names if prefix in modules), module) for names in prefixes]
        graph[module] = set(imported) - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _top(name: str) -> str:
    return name.split(".")[0]


def library_files() -> list[Path]:
    """The modules of grr/, without the two links."""
    return [path for path in (ROOT / "grr").rglob("*.py") if path.relative_to(ROOT).parts[1] not in LINKS]


FILES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*(ROOT / "components").glob("*.py"), *library_files(), *(ROOT / "recipes").glob("*.py")]
}


@pytest.mark.parametrize("folder", ["components", *LAYERS[1:], "recipes"])
def test_nothing_is_imported_from_above(folder: str):
    files = {file: text for file, text in FILES.items() if folder in (_room(file), file.partition("/")[0])}
    assert files
    assert [wrong for file, text in files.items() for wrong in wrong_imports(file, text)] == []


def test_the_public_files_import_no_recipe():
    files = {file: text for file, text in FILES.items() if _room(file) in PUBLIC}
    assert files
    assert [wrong for file, text in files.items() for wrong in wrong_imports(file, text)] == []


@pytest.mark.parametrize(
    ("file", "allowed", "refused"),
    [
        (
            "components/norms.py",
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
            "grr/data/order.py",
            [
                "from grr.components import Block",
                "import numpy",
                "from .images import normalize",
                "from grr.seeds import derive_seed",
                "from grr import __version__, config",
            ],
            [
                "import recipes.pretrain",
                "from grr import recipes",
                "from grr.recipes.pretrain import Run",
                "from ..recipes import pretrain",
                "import components",
                "from grr.parallel.process_group import all_sum",
                "from grr import models",
                "from .. import training",
                "from ..training.loss import contrastive_loss",
                "def f():\n    from grr.reports.page import page",
                "import grr.builders",
                "from grr import load",
            ],
        ),
        (
            "grr/seeds.py",
            ["import hashlib", "from grr.files.regular import read_regular_file"],
            ["from grr.data.order import mix", "from .data import order"],
        ),
        (
            "grr/__init__.py",
            ["from grr.inference.pretrained import load", "from .models import builders"],
            ["from . import recipes", "from grr.recipes import pretrain"],
        ),
        (
            "recipes/pretrain.py",
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
def test_a_planted_import_from_above_is_reported(file: str, allowed: list[str], refused: list[str]):
    reported = [source for source in allowed + refused if list(wrong_imports(file, source))]
    assert reported == refused


def test_a_report_names_the_file_the_import_and_the_rule():
    (report,) = wrong_imports("grr/files/disk.py", "def f():\n    from grr.data.order import mix")
    assert report == "grr/files/disk.py imports grr.data.order.mix; files imports components, config, files"


def test_no_modules_import_each_other_in_a_circle():
    assert cycle({file: text for file, text in FILES.items() if file.startswith("grr/")}) == []


CIRCLE = {"grr.a.x", "grr.a.y"}


@pytest.mark.parametrize(
    ("sources", "modules"),
    [
        (
            {"grr/a/x.py": "from grr.a.y import f", "grr/a/y.py": "def g():\n    from .x import h"},
            {"grr.a.x", "grr.a.y"},
        ),
        ({"grr/a/__init__.py": "from . import x", "grr/a/x.py": "from grr.a import f"}, {"grr.a", "grr.a.x"}),
        ({"grr/a/x.py": "import grr.a.y, grr.a.z", "grr/a/y.py": "import grr.a.z", "grr/a/z.py": ""}, set()),
    ],
    ids=["two modules", "a room and its module", "none"],
)
def test_a_planted_circle_is_reported(sources: dict[str, str], modules: set[str]):
    assert set(cycle(sources)) == modules


def test_the_rooms_are_few_and_none_has_many_files():
    """A folder within a room, such as data/formats, is counted by itself."""
    entries = {_room(str(path.relative_to(ROOT))) for path in library_files()} - {"__init__", "__main__"}
    assert entries <= {*LAYERS, *PUBLIC}
    assert len(entries) <= MOST_ENTRIES
    folders = {path.parent for path in library_files()}
    assert {str(folder): n for folder in folders if (n := len(list(folder.glob("*.py")))) > MOST_FILES} == {}


def _room(file: str) -> str:
    """The room of a file of grr/, or the file's own name; empty for other files."""
    folder, _, rest = file.partition("/")
    return rest.partition("/")[0].removesuffix(".py") if folder == "grr" else ""


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
    tests = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    found = {file: list(waits_without_a_deadline(text)) for file, text in (FILES | tests).items()}
    found.pop("recipes/sweep.py")
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
