"""What test_contrast.py measures in 2 and 4 processes: the contrastive losses over processes, against the plain ones.

torchrun --nproc_per_node N contrast_worker.py. Rank 0 prints as JSON, for each kind of loss, with all pairs and with
some: the largest difference of the loss and of its gradients from those of one process in float64, the token counts
that were gathered beside the embeddings, and the number of collectives.
"""

import json
import sys
from itertools import product

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from grr.parallel.process_group import all_rows, all_sum, process_group
from grr.training import contrast as module
from grr.training.contrast import contrast, gather_columns
from grr.training.loss import contrastive_loss, sigmoid_loss

PAIRS, DIM = 12, 5
SOME = [x == "1" for x in "101100111011"]  # no two processes have the same part of it


class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def measured(kind: str, some: bool) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, PAIRS, DIM, generator=generator, dtype=torch.float64)
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    kept = torch.tensor(SOME) if some else torch.ones(PAIRS, dtype=torch.bool)
    image, text = (part.requires_grad_() for part in x)
    if kind == "softmax":
        expected = contrastive_loss(image[kept], text[kept], 1 / scale)
    else:
        expected = sigmoid_loss(image[kept], text[kept], 1 / scale, bias)
    inputs = (image, text, scale, bias)[: 4 if kind == "sigmoid" else 3]
    exact = torch.autograd.grad(expected, inputs)

    mine = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    own = tuple(part.detach()[mine].requires_grad_() for part in (image, text))
    tokens = torch.arange(100, 100 + PAIRS)[mine]
    with Collectives() as collectives:
        columns, (counts, of_kept) = gather_columns(*own, tokens, kept[mine])
        columns = columns._replace(kept=of_kept > 0) if some else columns
        part = contrast(*own, scale, bias, columns, kind=kind)
        found = torch.autograd.grad(part, (*own, scale, bias)[: len(inputs)])
    # FSDP's mean over processes: only one process computes a row, and all processes compute the scale
    whole = [all_rows(g) / world for g in found[:2]] + [g.new_tensor(all_sum(g.item())) / world for g in found[2:]]
    differences = [(a - b).abs().max().item() for a, b in zip(whole, exact, strict=True)]
    return {
        "kind": kind,
        "some": some,
        "loss": abs(all_sum(part.item())[0] / world - expected.item()),
        "gradients": max(differences),
        "tokens": counts.tolist(),
        "collectives": len(collectives.names),
    }


def main() -> None:
    with process_group():
        module.CHUNK = 2 * PAIRS  # two rows
        rows = [measured(kind, some) for kind, some in product(("softmax", "sigmoid"), (False, True))]
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
