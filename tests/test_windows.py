"""Importing the library and using a model need nothing that Windows lacks."""

import subprocess
import sys

import pytest

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
