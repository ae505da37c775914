"""Memory of a process, and whether it has room for the whole weights and gradients of a sharded model."""

import logging
import os
from pathlib import Path

import torch
from torch import nn

from grr.parallel.device import default_device
from grr.parallel.process_group import all_max, is_rank_0

PART = 4  # whole weights and gradients may take a quarter of the free memory; activations and the optimizer need more

logger = logging.getLogger(__name__)


def has_room_for_whole(model: nn.Module, device: torch.device, *, bf16: bool) -> bool:
    """Decide whether each process holds whole weights and gradients through a step, alike in all, and log the figures.

    Weights are counted in the precision of the computation, gradients in float32, in which they are added up.
    """
    parameters = list(model.parameters())
    weights = sum(p.numel() * (2 if bf16 else p.element_size()) for p in parameters)
    gradients = sum(p.numel() * max(4, p.element_size()) for p in parameters if p.requires_grad)
    free = free_memory_of_process(device)
    keeps = not all_max(PART * (weights + gradients) > free)
    if is_rank_0():
        logger.info(
            "parallelize: keep_gathered=%s: whole weights and gradients take %.3g GB in a process, of %.3g GB free; "
            "up to a quarter is allowed",
            str(keeps).lower(),
            (weights + gradients) / 1e9,
            free / 1e9,
        )
    return keeps


def free_memory_of_process(device: torch.device) -> int:
    """Returns the free memory in bytes that one process may use: that of its GPU, or its part of the machine's."""
    processes = 1 if device.type != "cpu" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return free_memory() // processes


def free_memory() -> int:
    """Returns the free memory in bytes: of the GPU if there is one, else the lesser of machine and container.

    Of a Mac's GPU it is what torch recommends to use and has not taken; of a Mac's CPU, all memory of the machine,
    because macOS does not count free pages.
    """
    kind = default_device().type
    if kind == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    if kind == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError, StopIteration):  # not Linux, not a container, or a container without a limit
        pass
    return max(free, 0)
