"""Two commands from a fresh clone: what they install and when, and what they say where they cannot."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("pyproject.toml", "constraints.txt")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with what the Makefile reads."""
    for name in ("Makefile", *REQUIREMENTS):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1e9, 1e9))
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    names = ("PYTHON", "VENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of a make that runs these tests
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(["make", *words], cwd=folder, env=environment, text=True, timeout=60, capture_output=True)


def python(folder: Path, before: str) -> str:
    """A Python in which a line of code runs before what it is told to run."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; {before}; exec(sys.argv[1])' \"$2\"\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("sys.version_info = (3, 10, 9)", "Python must be 3.11 or newer"),
        ('sys.modules["ensurepip"] = None', "has no module venv; install it (on Debian and Ubuntu: apt-get install"),
        ('sys.modules["venv"] = None', "has no module venv; install it (on Debian and Ubuntu: apt-get install"),
    ],
)
def test_a_python_that_cannot_do_it_is_named_with_the_remedy_in_a_line(clone, before, said):
    done = make(clone, "test", f"PYTHON={python(clone, before)}")
    assert done.returncode == 2
    assert said in done.stderr
    assert "name another: make test PYTHON=python3.12" in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "")
    assert not (clone / ".venv").exists()


def test_without_a_python_it_says_what_to_install(clone):
    done = make(clone, "demo", "PYTHON=python0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there is no python0; install Python 3.11 or newer, or name another: make demo PYTHON=" in done.stderr


@pytest.mark.parametrize("target", ["demo", "test", "test-all"])
def test_a_target_installs_once_and_again_when_requirements_change(clone, target):
    def steps(*words: str) -> str:
        done = make(clone, "-n", target, f"PYTHON={sys.executable}", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = steps()
    assert f"{sys.executable} -m venv .venv\n" in first
    assert '.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"\n' in first
    assert "other/bin/python -m pip install" in steps("VENV=other")
    (clone / ".venv").mkdir()
    (clone / ".venv/installed").touch()
    assert "pip install" not in steps()
    for name in REQUIREMENTS:
        os.utime(clone / name, (time.time() + 60, time.time() + 60))
        assert "pip install" in steps()
        os.utime(clone / name, (1e9, 1e9))


@pytest.mark.slow
def test_an_installation_that_fails_is_repeated(clone):
    (clone / "pyproject.toml").write_text("no TOML")
    for _ in range(2):
        done = make(clone, "test", f"PYTHON={sys.executable}")
        assert done.returncode == 2
        assert ".venv/installed] Error" in done.stderr
        assert not (clone / ".venv/installed").exists()


def test_the_main_job_and_the_two_stages_of_tests_are_what_they_start(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv/installed").touch()
    assert "recipes/pretrain.py --config recipes/configs/pretrain/openmoji.yaml\n" in make(clone, "-n", "demo").stdout
    assert make(clone, "-n", "test").stdout == '.venv/bin/pytest -m "not slow"\n'
    assert make(clone, "-n", "test-all").stdout == ('.venv/bin/pytest -m "not slow"\n.venv/bin/pytest -m slow\n')
