"""Time and memory of calls, and the rates that a machine reaches at best."""

import contextlib
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from grr.parallel.device import device_name


class Measured(NamedTuple):
    """The cost of one call."""

    seconds: float  # the median of the calls that count
    warmup_seconds: float  # of all calls before them
    peak_bytes: int | None  # of torch's allocator on a GPU, else of the process; None where the system lacks it


def measure(act: Callable[[], object], device: torch.device, *, warmup: int, iterations: int) -> Measured:
    """Call `warmup` times, then `iterations` times that count."""
    has_peak = _reset_peak_bytes(device)
    (times,) = time_in_turns([act], device, rounds=warmup + iterations)
    peak = _peak_bytes(device) if has_peak else None
    return Measured(statistics.median(times[warmup:]), sum(times[:warmup]), peak)


def time_in_turns(
    acts: Sequence[Callable[[], object]], device: torch.device, *, rounds: int, progress: str | None = None
) -> list[list[float]]:
    """Returns the seconds of each call, by act. In a round each act is called once, so a slow minute slows all of them.

    progress: the title of a progress bar.
    """
    taken: list[list[float]] = [[] for _ in acts]
    for _ in tqdm(range(rounds), desc=progress, unit="round", disable=progress is None):
        for act, times in zip(acts, taken, strict=True):
            _synchronize(device)
            before = time.perf_counter()
            act()
            _synchronize(device)
            times.append(time.perf_counter() - before)
    return taken


def matmul_rate(device: torch.device, dtype: torch.dtype, *, warmup: int, iterations: int) -> float:
    """Returns the FLOP/s of one large matrix product, of random numbers: zeros can be faster."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / measure(partial(torch.mm, a, b), device, warmup=warmup, iterations=iterations).seconds


def read_rate(device: torch.device, *, warmup: int, iterations: int) -> float:
    """Returns the bytes/s of reading memory once: the sum of a GiB, which is larger than any cache."""
    x = torch.ones(2**28, device=device)
    return x.nbytes / measure(x.sum, device, warmup=warmup, iterations=iterations).seconds


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether an allocation failed, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def until_out_of_memory(what: str, variant: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of one variant; if memory does not suffice for the next, a row that says so ends them."""
    try:
        yield from rows
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        why = str(error).splitlines()[0]
    gc.collect()  # the error held the model, which must be freed before the next one is built
    yield {"what": what, "variant": variant, "out_of_memory": why}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the hardware and the versions that times depend on."""
    information = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", information.read_text() if information.is_file() else "")
    return {
        "device": device_name(device),
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def processor(machine: dict[str, Any]) -> str:
    """Returns the processors of `describe_machine` in words."""
    cpu = f"{machine['cpu']} ({machine['capability']})"
    return cpu if machine["device"] == "CPU" else f"{machine['device']}, {cpu}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _reset_peak_bytes(device: torch.device) -> bool:
    gc.collect()  # what an earlier measurement left
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again
        return True
    return False


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    mark = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert mark is not None
    return int(mark[1]) * 1024
