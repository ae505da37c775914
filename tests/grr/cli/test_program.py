"""A user's mistake is one line and an exit status, in one process and in many; a bug keeps its traceback."""

import errno
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grr.cli.program import attempt, is_user_mistake
from grr.config import ConfigError
from grr.experiments import catalog as installed
from grr.training.schedule import set_lr

RECIPES = installed.recipes()
PROGRAM = """
import json, os, pathlib, signal, sys, time
{imports}
from grr.cli.program import run_main

def refuse():
    raise ValueError("data: nothing is there")

def main():
{body}

run_main(main)
"""


def program(folder: Path, body: str, *launcher: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe whose main has this body."""
    imports = (
        "import torch.distributed as dist; from grr.parallel.process_group import all_sum, process_group"
        if "process_group" in body
        else ""
    )
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "recipe.py").write_text(PROGRAM.format(imports=imports, body=indented))
    return subprocess.run(
        [sys.executable, *launcher, "recipe.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def launched(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    return program(folder, body, "-m", "grr.cli.launch", "--nproc_per_node=2")


def caught_from(code: str, module: str = "grr.some", **names: object) -> Exception:
    try:
        exec(compile(code, "some.py", "exec"), {"__name__": module, **names})
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


# --- whose mistake it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, ImportError, FloatingPointError, ConfigError])
def test_what_grr_and_the_recipe_raise_is_a_users_mistake(kind):
    assert is_user_mistake(caught_from("raise kind('data: nothing is there')", kind=kind))
    assert is_user_mistake(caught_from("raise kind('data: nothing is there')", "__main__", kind=kind))
    assert not is_user_mistake(caught_from("raise kind('data: nothing is there')", "grrr", kind=kind))


@pytest.mark.parametrize(
    "code",
    [
        "int('ten')",
        "{}['key']",
        "raise KeyError(3)",
        "torch.zeros(2) + torch.zeros(3)",
        "torch.zeros(2).view(3)",
        "json.loads('{')",
        "(a, b) = [1]",
    ],
)
def test_what_a_library_or_a_built_in_function_raises_is_a_bug(code):
    import json

    assert not is_user_mistake(caught_from(code, torch=torch, json=json))


def test_an_error_of_the_package_keeps_its_owner_through_an_except_and_a_finally():
    wrapped = "try:\n try:\n  raise ValueError('data: rule')\n except ValueError:\n  raise\nfinally:\n x = 1"
    assert is_user_mistake(caught_from(wrapped))
    assert is_user_mistake(
        caught_from("try:\n int('x')\nexcept ValueError as e:\n raise ValueError('must be int') from e")
    )
    assert not is_user_mistake(caught_from("try:\n int('x')\nexcept ValueError:\n raise"))
    with pytest.raises(ValueError, match="no recipe or config 'gone'") as caught:
        installed.find("gone")
    assert is_user_mistake(caught.value)
    with pytest.raises(AttributeError) as bug:
        set_lr(None, 0.1)
    assert not is_user_mistake(bug.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_does_not_suffice_is_reported_with_the_option_that_needs_less(capsys, error):
    def act() -> None:
        raise error

    assert attempt(act, "pretrain") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pretrain: the memory does not suffice: ")
    assert "lower run.micro_batch_size" in line
    assert "out of memory" in line or "can't allocate memory" in line


def test_a_full_disk_is_reported_in_the_systems_words(capsys):
    def act() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/mine/x.pt")

    assert attempt(act, "pretrain") == 1
    assert capsys.readouterr().err == "pretrain: runs/mine/x.pt: No space left on device\n"


@pytest.mark.parametrize(
    ("name", "said", "line"),
    [
        ("sweep", "sweep: jobs must be at least 1", "sweep: jobs must be at least 1"),
        ("grr check", "check: a run has a process", "grr check: a run has a process"),
        ("grr check", "grr check: a run has a process", "grr check: a run has a process"),
        ("pretrain", "data: no file", "pretrain: data: no file"),
        ("pretrain", "data: it says\nbad\n\n", "pretrain: data: it says bad"),
        ("compare", "compare: these differ:\n  a\n  b", "compare: these differ:\n  a\n  b"),
        ("sweep", "sweep:\n  a\n  b", "sweep:\n  a\n  b"),
        ("pretrain", "", "pretrain: ValueError"),
    ],
)
def test_a_line_begins_with_the_programs_name_once(name, said, line, capsys, monkeypatch):
    monkeypatch.setattr("grr.cli.program.is_user_mistake", lambda error: True)

    def act() -> None:
        raise ValueError(said)

    assert attempt(act, name) == 1
    assert capsys.readouterr().err == line + "\n"


# --- a program's exit ----------------------------------------------------------------------------------------------


# the shell of a job in the background has its programs ignore SIGINT
CTRL_C = "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("pass", 0, ""),
        ("return 143", 143, ""),
        ("raise SystemExit(130)", 130, ""),
        ("refuse()", 1, "recipe: data: nothing is there\n"),
        ("open('gone.txt')", 1, "recipe: gone.txt: No such file or directory\n"),
        (CTRL_C, 130, ""),
        ("with process_group(): all_sum(1)", 0, ""),
        ("with process_group(): refuse()", 1, "recipe: data: nothing is there\n"),
    ],
)
def test_a_recipe_exits_with_its_status_and_at_most_its_mistake(body, status, said, tmp_path):
    done = program(tmp_path, body)
    assert (done.returncode, done.stderr) == (status, said)


def test_a_bug_keeps_its_traceback_and_so_does_every_error_when_debugging(tmp_path):
    done = program(tmp_path, "int('ten')")
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 1)
    done = program(tmp_path, "refuse()", GRR_DEBUG="1")
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 1)
    assert done.stderr.endswith("ValueError: data: nothing is there\n")


@pytest.mark.slow
def test_parts_of_torchao_that_are_not_installed_are_not_warned_of(tmp_path):
    pytest.importorskip("torchao", reason='pip install "grr-coca[quantize]"')
    done = program(tmp_path, "import torchao.kernel.intmm")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.name != "sizes"], ids=lambda r: r.name)
def test_every_recipe_prints_each_mistake_of_its_config_in_a_line(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.yaml").write_text("run: {foldr: here}\nmodle: {}\n")
    monkeypatch.setattr(sys, "argv", [str(recipe.path), "--config", str(tmp_path / "own.yaml")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(recipe.path), run_name="__main__")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "  modle: there is no such section" in said
    assert "  run.foldr: Run takes no such argument (did you mean folder?)" in said or "run.foldr" in said
    assert "Traceback" not in said


# --- many processes ------------------------------------------------------------------------------------------------

ONE = "recipe: data: nothing is there\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "refuse()",
        "with process_group(): refuse()",
        "with process_group():\n    if dist.get_rank() == 1: refuse()\n    all_sum(1)",  # rank 0 waits for it
        "with process_group():\n    if dist.get_rank() == 0: refuse()\n    all_sum(1)",
        "if os.environ['RANK'] == '1': refuse()\ntime.sleep(60)",  # rank 0 knows nothing of it
    ],
    ids=["before", "all", "rank 1", "rank 0", "rank 1 before"],
)
def test_many_processes_print_a_mistake_once(body, tmp_path):
    done = launched(tmp_path, body)
    assert (done.returncode, done.stderr) == (1, ONE)


@pytest.mark.slow
def test_torchruns_own_report_comes_after_the_mistake_and_ends_with_it(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = program(tmp_path, "with process_group(): refuse()", *torchrun)
    assert done.returncode == 1
    assert done.stderr.startswith(ONE)
    assert "traceback : recipe: data: nothing is there" in done.stderr.partition("Root Cause")[2]
    assert done.stderr.count("Traceback") == 1  # torchrun's


KILLED = """
with process_group():
    if dist.get_rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("with process_group(): all_sum(1)", 0, ""),
        ("with process_group(): raise SystemExit(143)", 143, ""),
        (KILLED, 137, "SIGKILL"),
        ("with process_group(): int('ten')", 1, "ValueError: invalid literal"),
    ],
    ids=["finished", "interrupted", "killed", "bug"],
)
def test_grr_run_exits_as_its_processes_do(body, status, said, tmp_path):
    done = launched(tmp_path, body)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "ChildFailedError" not in done.stderr


def test_neither_a_log_nor_a_mistake_prints_control_characters(tmp_path):
    body = """import logging
logging.basicConfig(format="%(message)s")
logging.warning("bad sample %s", "a\\x1b[2J\\u202e.jpg")
raise ValueError("data: captions.csv names \\x1b]0;title\\x07.jpg")"""
    done = program(tmp_path, body)
    assert done.returncode == 1
    printed = "bad sample a\\x1b[2J\\u202e.jpg\nrecipe: data: captions.csv names \\x1b]0;title\\x07.jpg\n"
    assert done.stderr == printed


def test_a_mistake_is_the_last_line_where_progress_is_shown(tmp_path):
    body = """from tqdm import tqdm
with tqdm(total=3) as bar:
    bar.update()
    raise ValueError("data: nothing is there")"""
    done = program(tmp_path, body)
    assert done.stderr.splitlines()[-1] == "recipe: data: nothing is there"
