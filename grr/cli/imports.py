"""Modules of a user, imported before a command or a recipe so that their builders and data formats are known by name.

    python -m grr.cli.imports recipes/pretrain.py --config ...

`grr --import MODULE` lists them in the environment variable GRR_IMPORT. This program imports those it lists, then runs
a recipe; `grr.experiments.catalog.command` starts recipes by it while the variable is set.
"""

import importlib
import importlib.util
import os
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

from grr.cli.program import attempt
from grr.experiments.catalog import IMPORTS

LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parents[1]))


def import_modules(names: Sequence[str] = ()) -> None:
    """Import the modules that GRR_IMPORT lists and then those named here, and list all of them for recipes.

    A name is that of an installed module or of one in the current folder, or the path of a file that ends in .py.
    Raises ImportError if there is no such module, if a file has the name of another module, or if a module raises an
    error when it is imported.
    """
    listed = filter(None, os.environ.get(IMPORTS, "").split(os.pathsep))
    modules = dict.fromkeys([*listed, *(os.path.abspath(name) if name.endswith(".py") else name for name in names)])
    if not modules:
        return
    sys.path.append(os.getcwd())
    for name in modules:
        try:
            if name.endswith(".py"):
                _import_file(Path(name))
            else:
                _import_name(name)
        except NoSuchModule:
            raise
        except Exception as error:
            said = error.msg if isinstance(error, SyntaxError) else error
            raise ImportError(
                f"--import: {_where(error) or name}: {type(error).__name__}: {said}; GRR_DEBUG=1 prints the traceback"
            ) from error
    os.environ[IMPORTS] = os.pathsep.join(modules)


def main(argv: Sequence[str] | None = None) -> int:
    """Import the modules, then run the recipe argv[0] with the rest of the arguments, as python does."""
    sys.argv = list(sys.argv[1:] if argv is None else argv)
    script = Path(sys.argv[0])
    sys.path[0] = str(script.absolute().parent)
    if status := attempt(import_modules, script.stem):
        return status
    runpy.run_path(str(script), run_name="__main__")
    return 0


class NoSuchModule(ImportError):
    """There is no module of the name, or it cannot be imported under it."""


def _where(error: Exception) -> str:
    """Returns the file and line of a module's error: the innermost that is not of a library; empty if none is known."""
    if isinstance(error, SyntaxError) and error.filename:
        places = [(error.filename, error.lineno)]
    else:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(frame.filename, frame.lineno) for frame in frames if Path(frame.filename).is_file()]
        places = [place for place in places if not Path(place[0]).samefile(__file__)]
    own = [place for place in places if not place[0].startswith(LIBRARIES)]
    if not places:
        return ""
    file, line = (own or places)[-1]
    folder = os.getcwd()
    return f"{os.path.relpath(file) if Path(file).is_relative_to(folder) else file} line {line}"


def _import_name(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise NoSuchModule(
            f"--import: there is no module {name!r}, installed or in {os.getcwd()}; give the path of its file, as in "
            "--import my_models.py"
        ) from None


def _import_file(file: Path) -> None:
    name = file.stem
    if not file.is_file():
        raise NoSuchModule(
            f"--import: there is no file {file}; give the path of a Python file, or the name of a module"
        )
    if name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) == str(file):
            return
        raise NoSuchModule(f"--import: {file} has the name of another module, {name}; rename the file")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.path.append(str(file.parent))  # for the modules beside it
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise


if __name__ == "__main__":
    raise SystemExit(main())
