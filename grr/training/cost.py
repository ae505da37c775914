"""Estimate the minutes, memory and disk of a training run from a step that is timed on this machine."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grr.components import adapter_parameters
from grr.data import Pairs, training_steps
from grr.data.images import Crop
from grr.data.inspect import Finding
from grr.data.order import largest_divisor
from grr.parallel.device import default_device
from grr.parallel.memory import free_memory
from grr.parallel.process_group import process_group
from grr.tokenizers import Tokenizer
from grr.training.micro_batch import USABLE, count_kept_bytes
from grr.training.optim import adamw, clip_gradients
from grr.training.step import global_batch_step

SLOW_STEP = 4.0  # seconds; a slower step is not followed by one of twice as many pairs
MAX_FIRST_STEP = 20.0  # seconds; a first step that is expected to take longer is not measured
NUM_IMAGES = 4096  # of the data set that the measured steps draw from


@dataclass
class RunPlan:
    """Settings of a training run that decide its cost."""

    folder: Path
    batch_size: int
    micro_batch_size: int | None  # None: as many pairs as fit the memory
    processes: int
    steps: int
    keep: int  # checkpoints
    dp_replicate: int
    workers: int
    optimizer: dict[str, Any]
    loss: dict[str, Any]


class FirstImages(Pairs):
    """One pair of each of the first images, so that a few steps do not draw an order of millions of pairs."""

    def __init__(self, pairs: Pairs) -> None:
        self.rows = np.sort(np.unique(pairs.image_of, return_index=True)[1])[:NUM_IMAGES]
        chosen = np.zeros(len(pairs), dtype=bool)
        chosen[self.rows] = True
        super().__init__(pairs.ids.take(chosen), pairs.captions.take(chosen), pairs.image_of[chosen])
        self.pairs = pairs

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return self.pairs.load(int(self.rows[i]), size=size, crop=crop)


@dataclass
class StepCost:
    """Cost of a step of `pairs` pairs in one process."""

    pairs: int
    computing: float  # seconds of forward and backward pass
    reading: float  # seconds
    updating: float  # seconds of the optimizer
    kept: float  # bytes of activations per pair


def run_cost(
    run: RunPlan, build: Callable[[], nn.Module], pairs: Pairs, tokenizer: Tokenizer, *, image_size: int, crop: Crop
) -> Iterator[Finding]:
    """Estimate the minutes, the memory and the disk of a run.

    After a warm-up step, steps of 2, 4, 8 ... pairs, up to a micro-batch, are timed for about 12 seconds; the fastest
    per pair is scaled to the batch of the run. Model, loss, optimizer and data are those of the run, in float32 and
    not compiled. If the model is too large or a step fails, a finding says so. Writes no files and raises no errors.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (RuntimeError, ValueError, TypeError) as error:
        yield Finding("model", f"it cannot be built: {' '.join(str(error).split())}", wrong=True)
        return
    n = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state, free = 4 * n + 12 * trained, free_memory()
    states = f"weights, gradients and optimizer state take {_gb(state)}"
    kept = trained if adapter_parameters(model) else n  # weights in a checkpoint
    yield _disk(run, n, 4 * kept + 8 * trained)
    if state > free / 2:
        yield Finding("time", f"not measured: {states}, and {_gb(free)} are free on this machine")
        return
    expected = 2 * 6 * n * _tokens(model, image_size, tokenizer.context_length) / _flops_per_second()
    if expected > MAX_FIRST_STEP:
        yield Finding("time", f"not measured: a step of 2 pairs may take {expected:,.0f} s on this machine; {states}")
        return
    try:
        measured = _measure(run, build(), FirstImages(pairs), tokenizer, image_size, crop)
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        yield Finding("time", f"not measured: a step failed ({' '.join(str(error).split())[:300]})")
        return
    run = _with_micro_batch_size(run, state, measured, free)
    yield _time(run, measured)
    yield _memory(run, state, measured, free)


def _with_micro_batch_size(run: RunPlan, state: int, measured: StepCost, free: int) -> RunPlan:
    """Returns the plan with the micro-batch size that the run would choose on this machine, if it has none."""
    if run.micro_batch_size is not None:
        return run
    room = USABLE[default_device().type] * free - state * run.dp_replicate / run.processes
    size = largest_divisor(run.batch_size // run.processes, int(room / max(1.0, measured.kept)))
    return replace(run, micro_batch_size=size)


def _measure(
    run: RunPlan, model: nn.Module, pairs: Pairs, tokenizer: Tokenizer, image_size: int, crop: Crop
) -> StepCost:
    """Time steps of increasing size, and return the fastest per pair: other programs may slow some of them."""
    with process_group() as device:
        model = model.to(device).train()
        optimizer = adamw(model, **run.optimizer)
        most = min(run.micro_batch_size or run.batch_size // run.processes, run.batch_size, len(pairs))
        size, steps, until = min(2, most), list[StepCost](), time.monotonic() + 3 * SLOW_STEP
        while True:
            steps.append(_step(run, model, optimizer, pairs, tokenizer, size, image_size, crop, device))
            slow = steps[-1].computing + steps[-1].reading > SLOW_STEP
            if time.monotonic() > until or (len(steps) > 1 and size == most):
                return min(steps, key=lambda step: (step.computing + step.reading) / step.pairs)
            size = min(2 * size, most) if len(steps) > 1 and not slow else size


def _step(
    run: RunPlan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: Pairs,
    tokenizer: Tokenizer,
    size: int,
    image_size: int,
    crop: Crop,
    device: torch.device,
) -> StepCost:
    begun = time.perf_counter()
    steps = training_steps(
        pairs, tokenizer, 0, 1, 0, 0, size, size, image_size, False, workers=0, crop=crop, max_bad_fraction=1.0
    )
    (batches,) = islice(steps, 1)
    read = time.perf_counter()
    with count_kept_bytes(model) as kept:
        global_batch_step(model, [batch.to(device) for batch in batches], 0, **run.loss)
    clip_gradients(model, 1.0).item()  # waits until the device has finished
    computed = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
    updated = time.perf_counter()
    return StepCost(size, computed - read, read - begun, updated - computed, kept.most / size)


def _time(run: RunPlan, measured: StepCost) -> Finding:
    """Returns the minutes of a run, without its validations."""
    assert run.micro_batch_size is not None
    pairs = run.batch_size / run.processes  # of a step in one process
    twice = pairs > run.micro_batch_size and run.loss.get("negatives", "global") == "global"  # GradCache
    computing = measured.computing / measured.pairs * pairs * (4 / 3 if twice else 1) + measured.updating
    reading = measured.reading / measured.pairs * pairs / max(1, run.workers)
    minutes = run.steps * max(computing, reading) / 60
    device = "CPU" if default_device().type == "cpu" else "GPU"
    message = (
        f"about {_minutes(minutes)} for {run.steps:,} steps without validation, on this {device}: "
        f"{max(computing, reading):.2g} s per step of {run.batch_size:,} pairs, scaled from one of {measured.pairs} in "
        f"{measured.computing + measured.updating:.2g} s, in float32 and not compiled"
    )
    if run.processes > 1:
        message += f"; each of the {run.processes:,} processes needs such a device"
    if reading > computing:
        message += f"; reading takes longer than computing ({computing:.2g} s): raise loader.workers"
    return Finding("time", message)


def _memory(run: RunPlan, state: int, measured: StepCost, free: int) -> Finding:
    assert run.micro_batch_size is not None
    kept = measured.kept * run.micro_batch_size
    held = state * run.dp_replicate / run.processes
    message = (
        f"about {_gb(held + kept)} per process: {_gb(held)} of weights, gradients and optimizer state, {_gb(kept)} of "
        f"activations of {run.micro_batch_size:,} pairs in float32; {_gb(free)} are free here"
    )
    wrong = held + kept > free
    return Finding("memory", message + ("; lower run.micro_batch_size" if wrong else ""), wrong=wrong)


def _disk(run: RunPlan, n: int, checkpoint: int) -> Finding:
    """Returns the disk space of the checkpoints, of two more while they are written, and of the final model.

    n: parameters, checkpoint: bytes of one.
    """
    most = 2 * (run.keep + 1) * checkpoint + 4 * n
    there = next(folder for folder in (run.folder.absolute(), *run.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    message = f"at most {_gb(most)} for the model and checkpoints of {_gb(checkpoint)}; {_gb(free)} are free"
    wrong = most > free
    return Finding("disk", message + ("; lower saving.keep, or move run.folder" if wrong else ""), wrong=wrong)


def _tokens(model: nn.Module, image_size: int, context_length: int) -> int:
    """Returns the longest sequence of the model: patches or tokens."""
    patch = getattr(getattr(getattr(model, "vision_encoder", None), "patches", None), "patch_size", 16)
    return max(context_length, (image_size // int(patch)) ** 2)


def _flops_per_second() -> float:
    """Returns the measured speed of matrix products on this device, roughly."""
    x = torch.randn(768, 768, device=default_device())
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
