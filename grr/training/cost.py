"""What a training run will take, from a step of it that is timed here: minutes, memory and disk."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grr.data import Pairs, training_steps
from grr.data.images import Crop
from grr.data.inspect import Finding
from grr.parallel.process_group import process_group
from grr.tokenizers.sentencepiece import Tokenizer
from grr.training.optim import adamw, clip_gradients
from grr.training.step import global_batch_step

SECONDS = 4.0  # that a step may take and be followed by one of twice as many pairs
AT_MOST = 20.0  # seconds that the first step may be expected to take
IMAGES = 4096  # that steps are taken of
STATE = 12  # bytes a weight in a checkpoint, in float32: itself and two moments


@dataclass
class Planned:
    """The parts of a training run that decide what it takes."""

    folder: Path
    batch_size: int
    micro_batch_size: int
    processes: int
    steps: int
    keep: int  # checkpoints
    dp_replicate: int
    workers: int
    optimizer: dict[str, Any]
    loss: dict[str, Any]


class Part(Pairs):
    """A pair of each of the first images: enough for some steps, so that no order of millions is drawn for them."""

    def __init__(self, pairs: Pairs) -> None:
        self.rows = np.sort(np.unique(pairs.image_of, return_index=True)[1])[:IMAGES]
        chosen = np.zeros(len(pairs), dtype=bool)
        chosen[self.rows] = True
        super().__init__(pairs.ids.take(chosen), pairs.captions.take(chosen), pairs.image_of[chosen])
        self.pairs = pairs

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return self.pairs.load(int(self.rows[i]), size=size, crop=crop)


@dataclass
class Measured:
    """A step of `pairs` pairs in one process, in seconds; bytes a pair that its forward pass keeps."""

    pairs: int
    computing: float
    reading: float
    updating: float
    kept: float


def run_cost(
    run: Planned, build: Callable[[], nn.Module], pairs: Pairs, tokenizer: Tokenizer, *, image_size: int, crop: Crop
) -> Iterator[Finding]:
    """Estimate the minutes, the memory and the disk of a run.

    After a step to warm up, steps of 2, 4, 8 ... pairs are taken, up to a micro-batch, for about 12 seconds; the one
    that is fastest a pair is scaled to the run's batch. It is the run's model, loss, optimizer and data, in float32 and
    not compiled. Where the model is too large for that, a line says so. Nothing is written, and nothing is raised.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (RuntimeError, ValueError, TypeError) as error:
        yield Finding("time", f"not measured: the model cannot be built ({' '.join(str(error).split())})")
        return
    n = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state, free = 4 * n + 12 * trained, free_memory()
    states = f"weights, gradients and optimizer state take {_gb(state)}"
    yield _disk(run, n)
    if state > free / 2:
        yield Finding("time", f"not measured: {states}, and {_gb(free)} are free on this machine")
        return
    expected = 2 * 6 * n * _tokens(model, image_size, tokenizer.context_length) / _flops_a_second()
    if expected > AT_MOST:
        yield Finding("time", f"not measured: a step of 2 pairs may take {expected:,.0f} s on this machine; {states}")
        return
    try:
        measured = _measure(run, build(), Part(pairs), tokenizer, image_size, crop)
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        yield Finding("time", f"not measured: a step failed ({' '.join(str(error).split())[:300]})")
        return
    yield _time(run, measured)
    yield _memory(run, state, measured, free)


def free_memory() -> int:
    """Bytes of memory that a process may still take: of the GPU where there is one, else of this machine or, if that is
    less, of the container."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError, StopIteration):  # no Linux, no container, or one without a limit
        pass
    return max(free, 0)


def _measure(
    run: Planned, model: nn.Module, pairs: Pairs, tokenizer: Tokenizer, image_size: int, crop: Crop
) -> Measured:
    """Take steps of more and more pairs, and return the fastest a pair: another program may slow some of them down."""
    with process_group() as device:
        model = model.to(device).train()
        optimizer = adamw(model, **run.optimizer | {"moments": "fp32"})
        most = min(run.micro_batch_size, run.batch_size, len(pairs))
        size, steps, until = min(2, most), list[Measured](), time.monotonic() + 3 * SECONDS
        while True:
            steps.append(_step(run, model, optimizer, pairs, tokenizer, size, image_size, crop, device))
            slow = steps[-1].computing + steps[-1].reading > SECONDS
            if time.monotonic() > until or (len(steps) > 1 and size == most):
                return min(steps, key=lambda step: (step.computing + step.reading) / step.pairs)
            size = min(2 * size, most) if len(steps) > 1 and not slow else size


def _step(
    run: Planned,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: Pairs,
    tokenizer: Tokenizer,
    size: int,
    image_size: int,
    crop: Crop,
    device: torch.device,
) -> Measured:
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    begun = time.perf_counter()
    steps = training_steps(
        pairs, tokenizer, 0, 1, 0, 0, size, size, image_size, False, workers=0, crop=crop, max_bad_fraction=1.0
    )
    (batches,) = islice(steps, 1)
    read = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        global_batch_step(model, [batch.to(device) for batch in batches], 0, **run.loss)
    clip_gradients(model, 1.0)  # reads a number, so the device has finished
    computed = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    updated = time.perf_counter()
    return Measured(size, computed - read, read - begun, updated - computed, sum(kept.values()) / size)


def _time(run: Planned, measured: Measured) -> Finding:
    """The minutes of a run, without its validations."""
    share = run.batch_size / run.processes  # pairs of a process
    twice = share > run.micro_batch_size and run.loss.get("negatives", "global") == "global"  # embedded, then replayed
    computing = measured.computing / measured.pairs * share * (4 / 3 if twice else 1) + measured.updating
    reading = measured.reading / measured.pairs * share / max(1, run.workers)
    minutes = run.steps * max(computing, reading) / 60
    device = "GPU" if torch.cuda.is_available() else "CPU"
    said = (
        f"about {_minutes(minutes)} for {run.steps:,} steps without validation, on this {device}: "
        f"{max(computing, reading):.2g} s a step of {run.batch_size:,} pairs, scaled from one of {measured.pairs} in "
        f"{measured.computing + measured.updating:.2g} s, in float32 and not compiled"
    )
    if run.processes > 1:
        said += f"; with one for each of {run.processes:,} processes"
    if reading > computing:
        said += f"; reading takes longer than computing ({computing:.2g} s): raise loader.workers"
    return Finding("time", said)


def _memory(run: Planned, state: int, measured: Measured, free: int) -> Finding:
    kept = measured.kept * run.micro_batch_size
    own = state * run.dp_replicate / run.processes
    said = (
        f"about {_gb(own + kept)} a process: {_gb(own)} of weights, gradients and optimizer state, {_gb(kept)} of "
        f"activations of {run.micro_batch_size:,} pairs in float32; {_gb(free)} are free here"
    )
    wrong = own + kept > free
    return Finding("memory", said + ("; lower run.micro_batch_size" if wrong else ""), wrong=wrong)


def _disk(run: Planned, n: int) -> Finding:
    """Checkpoints and the best ones, one more of each while it is written, and the model at the end."""
    most = 2 * (run.keep + 1) * STATE * n + 4 * n
    there = next(folder for folder in (run.folder.absolute(), *run.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    said = f"at most {_gb(most)} for the model and checkpoints of {_gb(STATE * n)}; {_gb(free)} are free"
    wrong = most > free
    return Finding("disk", said + ("; lower run.keep, or move run.folder" if wrong else ""), wrong=wrong)


def _tokens(model: nn.Module, image_size: int, context_length: int) -> int:
    """The longest sequence that a model reads, as far as it can be told: patches or tokens."""
    patch = getattr(getattr(getattr(model, "vision_encoder", None), "patches", None), "patch_size", 16)
    return max(context_length, (image_size // int(patch)) ** 2)


def _flops_a_second() -> float:
    """Of matrix products on the device that is there, roughly."""
    x = torch.randn(768, 768, device="cuda" if torch.cuda.is_available() else "cpu")
    (x @ x).sum().item()
    begun = time.perf_counter()
    (x @ x @ x).sum().item()
    return 2 * 2 * 768**3 / max(time.perf_counter() - begun, 1e-9)


def _minutes(minutes: float) -> str:
    if minutes < 1:
        return "a minute"
    return f"{math.ceil(minutes)} minutes" if minutes < 120 else f"{minutes / 60:,.0f} hours"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
