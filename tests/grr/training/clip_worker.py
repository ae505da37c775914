"""What test_clipping.py measures in 1, 2 and 4 processes: clip_gradients beside torch's clip_grad_norm_.

torchrun --nproc_per_node N clip_worker.py, or plain python for one process. Rank 0 prints as JSON a row for each way to
place the parameters, dtype and kind of gradient: the norms that both return, the largest relative difference of a
clipped gradient, and the all-reduces of ours.
"""

import json
import sys
from itertools import product

import torch
import torch.distributed as dist
from collectives import Collectives
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from grr.parallel.process_group import process_group
from grr.training.optim import clip_gradients

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
GRADIENTS = ("large", "small", "infinite", "nan", "none")


def placements() -> list[str]:
    return {1: ["plain"], 2: ["plain", "sharded"], 4: ["sharded", "replicated"]}[dist.get_world_size()]


def a_model(placement: str, dtype: torch.dtype) -> nn.Module:
    """Layers of which the last has fewer rows than there are processes, so that some hold nothing of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 1, bias=False)).to(dtype)
    if placement != "plain":
        world = dist.get_world_size()
        shape = (2, world // 2) if placement == "replicated" else (world,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        fully_shard(model, mesh=mesh)
    return model


def measured(placement: str, dtype: str, gradients: str) -> dict:
    models = [a_model(placement, DTYPES[dtype]) for _ in range(2)]
    for model in models:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 6, generator=generator).to(DTYPES[dtype])
        scale = {"large": 100.0, "small": 1e-3, "infinite": torch.inf, "nan": torch.nan, "none": 1.0}[gradients]
        if gradients != "none":
            (model(x).sum() * scale).backward()
    ours, theirs = models
    with Collectives() as collectives:
        norm = clip_gradients(ours, 0.5)
    expected = clip_grad_norm_(theirs.parameters(), 0.5)
    expected = expected.full_tensor() if isinstance(expected, DTensor) else expected
    assert isinstance(norm, torch.Tensor)
    found, exact = ([whole(p.grad) for p in m.parameters() if p.grad is not None] for m in models)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    return {
        "placement": placement,
        "dtype": dtype,
        "gradients": gradients,
        "norm": str(norm.item()),
        "expected": str(expected.item()),
        "all_reduces": collectives.counts["all_reduce"],
        "others": collectives.counts.total() - collectives.counts["all_reduce"],
    }


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def main() -> None:
    with process_group():
        rows = [measured(*case) for case in product(placements(), DTYPES, GRADIENTS)]
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
