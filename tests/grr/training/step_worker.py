"""One side of the equality tests: five optimizer steps on a fixed global batch, printed by rank 0 as JSON.

torchrun --nproc_per_node N step_worker.py '{"micro": 2, ...}', or plain python for one process.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from grr.data import Batch
from grr.data.collate import collate_captions
from grr.models.builders import grr_coca_tiny
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import process_group
from grr.training.optim import adamw
from grr.training.step import evaluation_losses, global_batch_step

GLOBAL = 16  # pairs


def global_batch(step: int) -> tuple[torch.Tensor, list[list[int]]]:
    """The images and rows of one step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (GLOBAL, 3, 32, 32), dtype=torch.uint8, generator=generator)
    rows = []
    for _ in range(GLOBAL):
        n = int(torch.randint(0, 14, (), generator=generator))
        tokens = torch.randint(3, 510, (n,), generator=generator).tolist()
        rows.append([510, *tokens, 1, *[0] * (13 - n), 511, 0])
    return images, rows


def micro_batches(step: int, micro: int) -> list[Batch]:
    """This process's share of it, in `micro` pieces, placed as the loader places them."""
    images, rows = global_batch(step)
    rank, world = dist.get_rank(), dist.get_world_size()
    size = GLOBAL // (micro * world)
    batches = []
    for i in range(micro):
        start = (i * world + rank) * size
        names = [str(j) for j in range(start, start + size)]
        batches.append(Batch(images[start : start + size], *collate_captions(rows[start : start + size]), names, 0))
    return batches


def main(
    micro: int = 1,
    steps: int = 5,
    dp_replicate: int = 1,
    bf16: bool = False,
    checkpointed: bool = False,
    dropout: float = 0.0,
    loss: dict[str, str] | None = None,
    model: dict | None = None,
) -> None:
    with process_group() as device:
        with torch.device("meta"):
            coca = grr_coca_tiny(dropout=dropout, **(model or {}))
        parallelize(coca, device, bf16=bf16, activation_checkpointing=checkpointed, dp_replicate=dp_replicate)
        initialize(coca, device, seed=0)
        optimizer = adamw(coca, lr=1e-3)
        seen = []
        for step in range(steps):
            losses = global_batch_step(coca, micro_batches(step, micro), step, **(loss or {})).read()
            norms = [p.grad.norm() for p in coca.parameters() if p.grad is not None]
            norms = [float(n.full_tensor() if hasattr(n, "full_tensor") else n) for n in norms]
            clip_grad_norm_(coca.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen.append({"losses": list(losses), "gradients": norms})
        coca.eval()
        validation = evaluation_losses(coca, [micro_batches(step, micro) for step in (7, 8)], **(loss or {}))
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps({"steps": seen, "validation": list(validation)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(**json.loads(sys.argv[1]))
