"""What test_low_bit.py runs in several processes: torchrun low_bit_worker.py FOLDER, a checkpoint of each format."""

import gc
import sys
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from grr.checkpoint.training_state import save_checkpoint
from grr.models.builders import grr_coca_tiny
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import start
from grr.training.low_bit import Bits
from grr.training.optim import adamw


def trained(steps: int, *, bits: Bits, sharded: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after some updates, by gradients that are the same whoever holds the model."""
    with torch.device("meta"):
        model = grr_coca_tiny(vision_layers=1, text_layers=1, multimodal_layers=1)
    if sharded:
        parallelize(model, torch.device("cpu"))
    initialize(model, torch.device("cpu"), seed=0)
    optimizer = adamw(model, lr=1e-2, layer_decay=0.9, moments=bits)
    update(model, optimizer, range(steps))
    return model, optimizer


def update(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(model.parameters()):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main(folder: Path) -> None:
    start()
    for bits in get_args(Bits):
        model, optimizer = trained(3, bits=bits, sharded=True)
        save_checkpoint(folder / bits, model, optimizer, {"step": 3})
        del model, optimizer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
