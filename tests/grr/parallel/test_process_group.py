"""A process group begins and ends with its block, and gathering is exact. Many processes: see test_step."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from programs import run
from waiting import started, wait_until

from grr.parallel.device import default_device
from grr.parallel.process_group import DelayedMax, all_rows, all_sum, process_group


def test_a_group_begins_and_ends_with_its_block():
    with process_group() as device:
        assert device == default_device()
        assert (dist.is_initialized(), dist.get_world_size()) == (True, 1)
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_ends_the_group_of_one_process(error):
    with pytest.raises(error), process_group():
        raise error
    assert not dist.is_initialized()


def test_a_group_that_exists_is_used_and_left():
    with process_group() as device:
        with process_group() as inner:
            assert inner == device
        assert all_sum(1) == [1]


def test_the_rows_of_one_process_are_all_rows_and_carry_no_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    with process_group():
        rows = all_rows(x)
        assert all_sum(1, 2.5) == [1, 2.5]
    assert torch.equal(rows, x)
    assert not rows.requires_grad


def test_one_process_has_its_own_maximum_at_once():
    with process_group():
        largest = DelayedMax()
        assert [largest(number) for number in (2, 0, 1)] == [2, 0, 1]


LIMITS = """
import resource
from grr.parallel.process_group import process_group
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
with process_group():
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""


def test_a_process_of_many_may_open_as_many_files_as_the_system_allows():
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", LIMITS]
    done = subprocess.run(command, env=os.environ | torchrun, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_delayed_maximum_of_two_processes_does_not_wait_for_the_other(tmp_path):
    worker = Path(__file__).parent / "delayed_max_worker.py"
    done = run([str(worker), str(tmp_path / "store")], processes=2)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    assert json.loads(lines[0].removeprefix("RESULT ")) == [[0, 0, 3, 2, 5, 0]] * 2


WITHOUT_LAUNCHER = """
import os, sys, time
from pathlib import Path
from grr.parallel.process_group import process_group
rank, end = os.environ["RANK"], time.monotonic() + 120
Path(f"{rank}.tmp").write_text(str(os.getpid()))
os.replace(f"{rank}.tmp", f"{rank}.pid")
while rank == "0" and not Path("killed").exists():  # rank 1 waits for it in the group
    assert time.monotonic() < end
    time.sleep(0.1)
with process_group():
    raise AssertionError("there is a group")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux, to see which processes run")
def test_processes_whose_launcher_was_killed_end_before_they_have_a_group(tmp_path):
    (tmp_path / "worker.py").write_text(WITHOUT_LAUNCHER)
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    words = [sys.executable, "-m", "grr.cli.launch", "--nproc_per_node", "2", "worker.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "errors").open("wb") as errors, contextlib.ExitStack() as stack:
        launcher = stack.enter_context(started(words, cwd=tmp_path, stderr=errors, env=environment))
        wait_until(lambda: all(file.exists() for file in files), launcher)
        workers = [int(file.read_text()) for file in files]
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in workers if runs(pid)])
        wait_until(lambda: len(os.listdir(f"/proc/{workers[1]}/task")) > 1, launcher)  # rank 1 joins the group
        os.kill(launcher.pid, signal.SIGKILL)
        wait_until(lambda: not runs(workers[1]), seconds=60)
        assert runs(workers[0])
        (tmp_path / "killed").touch()
        wait_until(lambda: not runs(workers[0]), seconds=60)
    said = (tmp_path / "errors").read_text()
    assert "the launcher of a run must not end before its processes, got no store at " in said
    assert "there is a group" not in said


def runs(pid: int) -> bool:
    """Whether a process runs: one that has ended and was not waited for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
