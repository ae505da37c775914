"""Importing the library and using a model need nothing that Windows lacks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WITHOUT = """
import os, signal, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("O_NONBLOCK", "O_NOCTTY", "fork", "killpg", "getuid", "geteuid", "mkfifo", "sched_getaffinity"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1"):
    delattr(signal, name)
"""
USE = """
import warnings; warnings.simplefilter("ignore")
import grr
captioner = grr.load(sys.argv[1])
print(captioner.caption([sys.argv[2]])[0])
print(tuple(captioner.embed_texts(["a red picture"]).shape))
from pathlib import Path
from grr.checkpoint.run_lock import RunLock
from grr.parallel.process_group import process_group
import grr.data, grr.evaluation.evaluate, grr.inference.index, grr.checkpoint.saver, grr.cli.program
with process_group():
    try:
        RunLock(Path(sys.argv[3]))
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_model_is_loaded_and_used_without_what_windows_lacks_and_a_run_says_what_to_use(colour_run, tmp_path):
    from PIL import Image

    picture = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    words = [sys.executable, "-c", WITHOUT + USE, str(colour_run), str(picture), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    caption, shape, refusal = done.stdout.splitlines()[-3:]
    assert caption == "a red picture"
    assert shape == "(1, 64)"
    assert "this system has no locks of files (fcntl); use Linux, macOS or WSL to train" in refusal


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, timeout=120, capture_output=True)


def test_a_clone_without_links_says_what_to_do_and_that_helps(tmp_path):
    """git writes the two links as text files, as on Windows without developer mode."""
    mine, clone = tmp_path / "mine", tmp_path / "clone"
    hidden = shutil.ignore_patterns("__pycache__")
    for name in ("grr", "components", "recipes"):
        shutil.copytree(ROOT / name, mine / name, symlinks=True, ignore=hidden)
    git(mine, "init", "-q")
    git(mine, "add", "-A")
    git(mine, "commit", "-qm", "all")
    git(tmp_path, "clone", "-q", "-c", "core.symlinks=false", str(mine), str(clone))
    assert (clone / "grr/components").read_text() == "../components"
    words = [sys.executable, "-c", "import grr.components.norms; print(grr.__file__)"]
    done = subprocess.run(words, cwd=clone, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("ImportError")]
    assert f"got text files, {clone / 'grr/components'}, {clone / 'grr/recipes'}; in the clone run" in message
    for remedy in ("git config core.symlinks true", "git checkout -- grr/components grr/recipes"):
        assert f"`{remedy}`" in message
        git(clone, *remedy.split()[1:])
    done = subprocess.run(words, cwd=clone, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(clone / "grr/__init__.py"), done.stderr
