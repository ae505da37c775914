"""What test_collectives.py measures in 2 and 4 processes: the collectives of an optimizer step.

torchrun --nproc_per_node N collectives_worker.py '{"dp_replicate": 2}', with arguments of parallelize. Rank 0 prints as
JSON a row for each choice of keep_gathered, micro-batches and losses: how often this process communicated and how many
bytes, by kind, and whether all parameters are shards again afterwards.
"""

import gc
import json
import sys
from itertools import product

import torch
import torch.distributed as dist
from collectives import Collectives
from torch.distributed.tensor import DTensor

from grr.data import Batch
from grr.data.collate import collate_captions
from grr.models.builders import grr_coca_tiny
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import process_group
from grr.parallel.shard import sharded_parts
from grr.training.optim import adamw, clip_gradients
from grr.training.step import global_batch_step

PAIRS = 4  # of a micro-batch
CASES = [*product((True, False), (1, 4), ("softmax",), ("global",)), (True, 4, "sigmoid", "global")]
CASES += [*product((True,), (1, 4), ("softmax",), ("local",))]


def a_batch(generator: torch.Generator) -> Batch:
    lengths = torch.randint(0, 14, (PAIRS,), generator=generator).tolist()
    tokens = [torch.randint(3, 510, (n,), generator=generator).tolist() for n in lengths]
    rows = [[510, *t, 1, *[0] * (13 - len(t)), 511, 0] for t in tokens]
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(images, *collate_captions(rows), [""] * PAIRS, 0)


def measured(keep_gathered: bool, micro: int, contrastive: str, negatives: str, **prepared: object) -> dict:
    with torch.device("meta"):
        model = grr_coca_tiny(learned_temperature=True)
    parallelize(model, torch.device("cpu"), bf16=True, keep_gathered=keep_gathered, **prepared)
    initialize(model, torch.device("cpu"), seed=0)
    optimizer = adamw(model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = [a_batch(generator) for _ in range(micro)]
    for _ in range(2):  # the first step is that of a model that was never run
        with Collectives() as collectives:
            global_batch_step(model, batches, 0, contrastive=contrastive, negatives=negatives)
            clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {
        "keep_gathered": keep_gathered,
        "micro": micro,
        "contrastive": contrastive,
        "negatives": negatives,
        "parts": len(sharded_parts(model)),
        "counts": collectives.counts,
        "bytes": collectives.bytes,
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
    }


def main(**prepared: object) -> None:
    with process_group():
        rows = []
        for case in CASES[: None if dist.get_world_size() == 2 else 2]:
            rows.append(measured(*case, **prepared))
            gc.collect()
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(**json.loads(sys.argv[1]))
