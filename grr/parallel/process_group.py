"""The process group of a run, and what its processes compute together."""

import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from grr.parallel.device import default_device

DEADLINE = timedelta(minutes=30)  # for the other processes to arrive; that of torch's collectives with gloo
PATIENCE = timedelta(days=30)  # for processes that work by themselves for long

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the process group that torchrun describes, or make a group of one process; yields this process's device.

        with process_group() as device:
            model.to(device)

    CUDA with NCCL where there is a GPU, else a Mac's GPU in a group of one, else the CPU with gloo. A group of one
    process runs the same code as one of many. The group ends with the block. A group that exists already is used and
    left. After an error in one of many processes the group is left too, because the others may wait in a collective:
    their launcher ends them.
    """
    if dist.is_initialized():
        yield default_device()
        return
    device = _begin()
    try:
        yield device
    except Exception:
        if dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise
    except BaseException:  # SystemExit and KeyboardInterrupt reach all processes of a run
        _end()
        raise
    _end()


def num_processes() -> int:
    """Returns the number of processes that `process_group` joins, before it is called too."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def _begin() -> torch.device:
    """Begin the process group of `process_group`; returns this process's device."""
    device = default_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        _allow_open_files()
        with _ended_with_launcher():
            dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return device


@contextmanager
def _ended_with_launcher() -> Iterator[None]:
    """End this process if torchrun, which started it, ends before the block does; else it would wait for DEADLINE.

    Raises ConnectionError if torchrun has ended before, which its store shows.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield
        return
    launcher, joined = os.getppid(), threading.Event()
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        socket.create_connection(address, timeout=DEADLINE.total_seconds()).close()
    except ConnectionRefusedError:
        raise ConnectionError(
            "process_group: the launcher of a run must not end before its processes, got no store at "
            f"{address[0]}:{address[1]}; start the run again"
        ) from None
    except OSError:  # another one, which torch tries again
        pass

    def watch() -> None:
        while not joined.wait(1):
            if os.getppid() != launcher:
                os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _allow_open_files() -> None:
    """Raise the soft limit of open files to the hard one: gloo connects each process to all others, once a group.

    The soft limit is often 1,024, which a thousand processes reach in the first group.
    """
    with suppress(ImportError, ValueError, OSError):  # Windows has none; a system may refuse its own limit
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        gc.collect()  # a sharded model that is not collected yet may abort the end of the process group
        dist.destroy_process_group()


def is_rank_0() -> bool:
    """Returns whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def all_rows(x: Tensor) -> Tensor:
    """Concatenate the rows of all processes, in their order: [b, ...] -> [world b, ...]. Equal b everywhere.

    The result does not carry a gradient.
    """
    x, world = x.detach().contiguous(), dist.get_world_size()
    if world == 1:
        return x
    rows = x.new_empty(world * len(x), *x.shape[1:])
    dist.all_gather(list(rows.chunk(world)), x)
    return rows


def rank_and_world() -> tuple[int, int]:
    """Returns the number of this process and the number of processes: 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Wait until all processes call it, for PATIENCE where collectives would give up after minutes."""
    if rank_and_world()[1] > 1:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.all_reduce(torch.zeros(1), group=group)
        dist.destroy_process_group(group)


def all_sum(*numbers: float) -> list[float]:
    """Returns the sum of each number over all processes."""
    if dist.get_world_size() == 1:
        return [float(number) for number in numbers]
    total = torch.tensor(numbers, dtype=torch.float64, device=default_device())
    dist.all_reduce(total)
    return total.tolist()


def sum_over_processes(x: Tensor) -> Tensor:
    """Returns the sum of a tensor over all processes, on its device; does not wait for it."""
    if dist.get_world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def all_max(*numbers: int) -> int:
    """Returns the largest of the integers of all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return max(numbers)
    largest = torch.tensor(max(numbers), device=default_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


class DelayedMax:
    """Largest of an integer over all processes, which the next call returns, so that no process waits for another.

    One process has its integer at once.

        largest = DelayedMax()
        for ...:                     # the steps of a run
            status = largest(mine)   # that of the step before; 0 in the first

    The integers travel over gloo, on the host, so a GPU is not involved. Made, and called, by all processes alike.
    """

    def __init__(self) -> None:
        many = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if many else None
        self._number, self._work = torch.zeros((), dtype=torch.int64), None

    def __call__(self, number: int) -> int:
        if self._group is None:
            return number
        if self._work is not None:
            self._work.wait(timeout=DEADLINE)  # it began a step ago
        previous, self._number = int(self._number), torch.tensor(number)
        self._work = dist.all_reduce(self._number, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return previous


def on_rank_0(act: Callable[[], T]) -> T:
    """Run act on rank 0 alone; when it is done, every rank has its result, or raises its error."""
    if not dist.is_initialized():
        return act()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result
