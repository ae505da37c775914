"""Size of a micro-batch: as large as memory allows, so that a step needs as few passes as possible."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn

from grr.data import Batch
from grr.data.order import largest_divisor
from grr.parallel.bf16 import bf16_copies
from grr.parallel.device import default_device
from grr.parallel.memory import free_memory_of_process
from grr.parallel.process_group import all_max, on_rank_0
from grr.parallel.shard import local
from grr.tokenizers import Tokenizer
from grr.training.random_batches import random_batches

PROBES = (2, 4)  # pairs in the steps that are measured
USABLE = {
    "cuda": 0.9,
    "cpu": 0.5,
    "mps": 0.5,
}  # fraction of the free memory: a GPU's is split in blocks, that of a CPU or a Mac shared by programs

logger = logging.getLogger(__name__)


def choose_micro_batch_size(
    run: Mapping[str, Any],
    step: Callable[[list[Batch]], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    image_size: int,
    *,
    resumed: Path | None = None,
) -> int:
    """Returns run["micro_batch_size"]; if it is None, the largest that fits the memory of every process, and logs it.

    step computes the gradients of a list of micro-batches. It is run, not compiled, on one of 2 and on one of 4 pairs
    with the longest captions; from the memory that the two steps take follow the bytes of a pair. A pair of a larger
    micro-batch takes less, because what is cheap to compute is kept only while it is small
    (`grr.components.recomputable`), so the step is run at the size found, and again while the bytes of a pair there
    leave room for more. The size divides run["batch_size"] / processes; all processes return the same. resumed: the
    folder of a run that continues, whose config.yaml holds the size of its steps before, and which uses it again,
    because with another size sums round otherwise.
    """
    if run["micro_batch_size"] is not None:
        return int(run["micro_batch_size"])
    most = max(1, run["batch_size"] // dist.get_world_size())
    before = on_rank_0(lambda: _recorded(resumed)) if resumed is not None else None
    if before is not None and most % before == 0:
        logger.info("micro-batches have %d pairs, as in the steps before", before)
        return before
    device = default_device()
    measure = partial(_bytes, step, model, optimizer, tokenizer, device, image_size)
    if device.type == "cuda":
        measure(PROBES[0])  # allocates workspaces as well
    few, more = map(measure, PROBES)
    per_pair = max(1.0, (more - few) / (PROBES[1] - PROBES[0]))
    fixed = max(0.0, few - PROBES[0] * per_pair)
    free = free_memory_of_process(device)
    room = USABLE[device.type] * free - fixed - _bytes_to_come(optimizer, gradients=device.type != "cuda")
    size, measured = _fitting(most, room, per_pair), PROBES[1] - 1
    while measured < size < most:
        per_pair = max(1.0, (measure(size) - fixed) / size)
        size, measured = max(size, _fitting(most, room, per_pair)), size
    logger.info(
        "micro-batches have %d of the %d pairs that a process reads in a step: a pair takes %.1f MB, and %.1f GB of "
        "memory are free; set run.micro_batch_size to choose another size",
        *(size, most, per_pair / 1e6, free / 1e9),
    )
    return size


class KeptBytes:
    """Bytes of the storages that graphs keep for their backward pass: now, and the most at any time."""

    def __init__(self) -> None:
        self.now, self.most = 0, 0
        self._uses: Counter[int] = Counter()  # id of a storage -> saved tensors that live in it

    def add(self, storage: torch.UntypedStorage) -> None:
        self._uses[id(storage)] += 1
        if self._uses[id(storage)] == 1:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def remove(self, storage: torch.UntypedStorage) -> None:
        self._uses[id(storage)] -= 1
        if self._uses[id(storage)] == 0:
            self.now -= storage.nbytes()


class _Saved:
    """A tensor that a graph keeps, counted until the graph drops it."""

    def __init__(self, x: Tensor, kept: KeptBytes) -> None:
        self.x, self.storage, self.kept = x.detach(), x.untyped_storage(), kept  # an output would keep its own graph
        kept.add(self.storage)

    def __del__(self) -> None:
        self.kept.remove(self.storage)


@contextmanager
def count_kept_bytes(model: nn.Module) -> Iterator[KeptBytes]:
    """Count what the code in the block keeps for backward passes, without the model's weights and bfloat16 copies."""
    kept, weights, copies = KeptBytes(), _storages(local(p) for p in model.parameters()), _storages(())

    def pack(x: Tensor) -> Tensor | _Saved:
        if not copies:  # here, because the first pass makes them
            copies.update(_storages(bf16_copies(model)))
        of_model = id(x.untyped_storage()) in weights or id(x.untyped_storage()) in copies
        return x if of_model else _Saved(x, kept)

    def unpack(saved: Tensor | _Saved) -> Tensor:
        return saved.x if isinstance(saved, _Saved) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Returns the storages of tensors by their ids, which stay theirs while this lives."""
    return {id(storage): storage for storage in (x.untyped_storage() for x in tensors)}


def _recorded(folder: Path) -> int | None:
    """Returns the micro-batch size in the config.yaml of a run's folder; None if there is none."""
    file = folder / "config.yaml"
    size = OmegaConf.select(OmegaConf.load(file), "run.micro_batch_size") if file.is_file() else None
    return size if isinstance(size, int) else None


def _fitting(most: int, room: float, per_pair: float) -> int:
    """Returns the largest divisor of `most` pairs that fits the room of every process."""
    return largest_divisor(most, -all_max(-int(room / per_pair)))


def _bytes(
    step: Callable[[list[Batch]], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    device: torch.device,
    image_size: int,
    n: int,
) -> int:
    """Measure the bytes that a step of n pairs takes."""
    lengths = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
    with torch.compiler.set_stance("force_eager"):
        (batch,) = random_batches(1, batch_size=n, image_size=image_size, **lengths)
        batch = replace(batch, classes=torch.zeros(n, dtype=torch.int64)).to(device)
        taken = _bytes_of_step(partial(step, [batch]), model, device)
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        del batch
        torch.cuda.empty_cache()
    return taken


def _bytes_of_step(run: Callable[[], object], model: nn.Module, device: torch.device) -> int:
    """Returns the peak of the allocated memory of a GPU during a step; elsewhere that of what graphs keep."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with count_kept_bytes(model) as kept:
        run()
    return kept.most


def _bytes_to_come(optimizer: torch.optim.Optimizer, *, gradients: bool) -> int:
    """Returns the bytes of the optimizer state that is not allocated yet, and of the gradients."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    states = sum(2 * local(p).nbytes for p in weights if p not in optimizer.state)
    return states + (sum(local(p).nbytes for p in weights) if gradients else 0)
