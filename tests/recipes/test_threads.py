"""How the threads of a recipe wait is decided before torch is loaded, because it is read then and never again."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.py"))
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def read_by_openmp(**variables: str) -> dict[str, str]:
    """The variables as GNU's OpenMP prints them when torch loads it in the process of a recipe."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, str(RECIPES[0].parent / "pretrain.py"), "--help"],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^\s*(?:\[host\] )?(\w+) = '(.*)'$", done.stderr, re.MULTILINE))
    if "GOMP_SPINCOUNT" not in found:
        pytest.skip("torch is built with another OpenMP than GNU's")
    return {name: found[name] for name in VARIABLES}


def test_threads_of_a_recipe_spin_briefly():
    assert read_by_openmp() == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def test_a_policy_of_the_user_remains():
    assert read_by_openmp(OMP_WAIT_POLICY="ACTIVE")["GOMP_SPINCOUNT"] not in ("1000", "0")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_imports_grr_before_torch(recipe):
    imports = [node for node in ast.parse(recipe.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    packages = [
        name.partition(".")[0]
        for node in imports
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    assert packages.index("grr") < (packages.index("torch") if "torch" in packages else len(packages))
