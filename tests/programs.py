"""Python programs that tests start, as forks of a process that has imported torch.

A fork takes milliseconds, an import of torch seconds. Each program has a process of its own all the same, with its
command line, folder, environment, output and exit status; nothing of grr is imported before. What depends on how a
process starts (imports, PYTHONPATH, torchrun) or is sent a signal by a test is started with subprocess.

Tests import this file for `run`, which starts it once as the process that forks.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from select import select
from typing import Any


def run(
    words: list[str], *, cwd: str | Path = ".", processes: int = 1, timeout: float = 300.0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python *words` to its end: a file, or -m and a module, and arguments. variables: more of the environment.

    Of more than one process, each is a rank of a process group as under torchrun; they share the outputs. The first to
    fail ends the others, and its exit status is that of all.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environments, store = ([environment], None) if processes == 1 else _ranks(processes, environment)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        order = {"words": words, "cwd": str(cwd), "outputs": outputs, "timeout": timeout, "environments": environments}
        server = _server()
        print(json.dumps(order), file=server.stdin, flush=True)
        status = json.loads(server.stdout.readline())
        stdout, stderr = (Path(file).read_text(errors="replace") for file in outputs)
    del store
    if status is None:
        raise subprocess.TimeoutExpired(words, timeout, stdout, stderr)
    return subprocess.CompletedProcess(words, status, stdout, stderr)


@functools.cache
def _server() -> Any:
    """The process that forks: one, from the first program to the end of this process."""
    start, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE  # torch reads it when it is imported
    server = subprocess.Popen([sys.executable, __file__], text=True, stdin=pipe, stdout=pipe, env=start)
    atexit.register(server.communicate)  # the end of its input is its end
    return server


def _ranks(processes: int, environment: dict[str, str]) -> tuple[list[dict[str, str]], object]:
    """The environments of the ranks, and what they find each other by, at a port that is free."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**environment, **group, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)], store


# --- the process that forks ------------------------------------------------------------------------------------------


def serve() -> dict[str, Any]:
    """Start the processes of each order of standard input and print how they ended; returns in each of them, once."""
    import_all()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for environment in order["environments"]:
            pid = os.fork()
            if pid == 0:
                return order | {"environment": environment}
            os.setpgid(pid, pid)
            pids.append(pid)
        print(json.dumps(ended(pids, order["timeout"])), flush=True)
    sys.exit()


def import_all() -> None:
    """What programs import of other packages, and takes long."""
    import numpy  # noqa: F401
    import omegaconf  # noqa: F401
    import PIL.Image  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch
    import torch._dynamo  # which the first step of an optimizer imports
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import tqdm  # noqa: F401

    assert not torch.cuda.is_initialized()


def ended(pids: list[int], seconds: float) -> int | None:
    """Wait for processes: the exit status of the first that fails, 0 if none does, None if the time is over.

    The others are killed, and what they started.
    """
    running, deadline, status = {os.pidfd_open(pid): pid for pid in pids}, time.monotonic() + seconds, 0
    while running and status == 0:
        ready, _, _ = select(running, [], [], max(0.0, deadline - time.monotonic()))
        for end in ready:
            status = status or os.waitstatus_to_exitcode(os.waitpid(running.pop(end), 0)[1])
            os.close(end)
        if not ready:
            break
    for end, pid in running.items():
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(end)
    return None if running and status == 0 else status


def become(words: list[str], cwd: str, outputs: list[str], environment: dict[str, str]) -> None:
    """Make this process what `python *words` starts."""
    import numpy

    for place, file in enumerate((os.devnull, *outputs)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, place)
        os.close(opened)
    sys.stdin = os.fdopen(0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    numpy.random.seed()  # two processes that do not seed it do not draw the same numbers
    sys.argv = words
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    order = serve()
    become(order["words"], order["cwd"], order["outputs"], order["environment"])
