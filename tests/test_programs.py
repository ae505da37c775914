"""Programs that tests run as forks are processes of their own, and end as `python` would end them."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from programs import run
from waiting import wait_until


@pytest.fixture
def program(tmp_path):
    """Write a program; returns its command line."""

    def write(text: str, *words: str) -> list[str]:
        (tmp_path / "program.py").write_text(f"import os, signal, sys, time\n{text}\n")
        return ["program.py", *words]

    return write


def test_a_program_has_its_own_words_folder_environment_and_outputs(program, tmp_path):
    text = "print(sys.argv, os.getcwd(), os.environ['COLOUR'], __name__, sys.path[0])\n"
    text += "print(sys.stdin.read(), file=sys.stderr)"
    done = run(program(text, "a", "b=1"), cwd=tmp_path, COLOUR="red")
    assert done.stdout == f"['program.py', 'a', 'b=1'] {tmp_path} red __main__ {tmp_path}\n"
    assert (done.returncode, done.stderr) == (0, "\n")
    assert "COLOUR" not in os.environ


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('wrong')", 1, "wrong\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
    ],
)
def test_it_ends_with_its_status(program, tmp_path, text, status, said):
    done = run(program(text), cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr.endswith(said)


def test_a_program_knows_nothing_of_the_one_before_nor_of_grr(program, tmp_path):
    text = (
        "import torch, random, numpy\nassert 'grr' not in sys.modules and not hasattr(torch, 'mark')\ntorch.mark = 1\n"
    )
    text += "print(random.random(), numpy.random.rand())"
    one, other = (run(program(text), cwd=tmp_path) for _ in range(2))
    assert (one.returncode, other.returncode) == (0, 0), other.stderr
    assert not set(one.stdout.split()) & set(other.stdout.split())


def test_a_module_of_the_folder_is_run_by_its_name(tmp_path):
    (tmp_path / "module.py").write_text("import sys; print(sys.argv[1:], __name__)")
    assert run(["-m", "module", "a"], cwd=tmp_path).stdout == "['a'] __main__\n"


RANKS = """
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
print(f"rank {dist.get_rank()} of {dist.get_world_size()}")
dist.destroy_process_group()
"""


def test_ranks_are_a_group_and_share_the_outputs(program, tmp_path):
    done = run(program(RANKS), cwd=tmp_path, processes=3)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank . of .", done.stdout)) == [f"rank {i} of 3" for i in range(3)]


def has_ended(pid: str) -> bool:
    """Whether a process does not run any more, also where no one has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_rank_that_fails_ends_the_others_and_what_they_started(program, tmp_path):
    """Rank 0 and its child would sleep for ten minutes; in a barrier, gloo would end it as soon as rank 1 leaves."""
    sleeps = "if os.fork() == 0:\n    open('child', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    fails = "while not os.path.exists('child') or not open('child').read(): time.sleep(0.01)\nsys.exit(7)"
    text = f"exec({sleeps!r} if os.environ['RANK'] == '0' else {fails!r})"
    done = run(program(text), cwd=tmp_path, processes=2, timeout=60)
    assert done.returncode == 7, done.stderr
    pid = (tmp_path / "child").read_text()
    wait_until(lambda: has_ended(pid), seconds=30)


def test_a_program_that_takes_too_long_is_killed(program, tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        run(program("print('begun', flush=True)\ntime.sleep(600)"), cwd=tmp_path, timeout=1.0)
    assert run(program("pass"), cwd=tmp_path).returncode == 0  # the next one runs
