"""What test_gradients.py measures in 1, 2 and 4 processes: gradients of a step in float64, against plain formulas.

torchrun --nproc_per_node N gradients_worker.py '{"cases": [...], "dp_replicate": 2}', with arguments of `measured`; or
imported, for one process. Rank 0 prints as JSON, for each combination of micro-batches, losses and dropout, how far
losses and gradients are from those of one process that reads the whole batch at once, untrimmed, and holds all logits
and similarities.
"""

import functools
import gc
import json
import sys
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grr.components import fold_in
from grr.data import Batch
from grr.data.collate import collate_captions
from grr.models.builders import grr_coca_tiny
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import process_group
from grr.seeds import derive_seed
from grr.training.step import global_batch_step

PAIRS, SEED = 16, 5
CASES = [
    {"contrastive": contrastive, "negatives": negatives, "learned": learned, "dropout": dropout}
    for learned, dropout, contrastive, negatives in product(
        (False, True), (0.0, 0.3), ("softmax", "sigmoid"), ("global", "local")
    )
]


def global_batch() -> tuple[Tensor, list[list[int]]]:
    """Captions of 0 to 13 tokens, so that micro-batches are trimmed to different lengths."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, 3, 32, 32, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, 14, (PAIRS,), generator=generator).tolist()
    tokens = [torch.randint(3, 510, (n,), generator=generator).tolist() for n in lengths]
    return images, [[510, *t, 1, *[0] * (13 - len(t)), 511, 0] for t in tokens]


def micro_batches(size: int) -> list[Batch]:
    """Those of this process, as the loader cuts them."""
    images, rows = global_batch()
    starts = range(dist.get_rank() * size, PAIRS, dist.get_world_size() * size)
    return [Batch(images[s : s + size], *collate_captions(rows[s : s + size]), [""] * size, 0) for s in starts]


def a_model(*, learned: bool, dropout: float, prepared: dict[str, Any] | None) -> nn.Module:
    with torch.device("meta"):
        model = grr_coca_tiny(
            vision_layers=1,
            text_layers=2,
            multimodal_layers=1,
            learned_temperature=learned,
            logit_bias=-1.0,
            temperature=0.1,
            dropout=dropout,
            patch_dropout=0.5 if dropout else 0.0,
        )
        model = model.double()
    if prepared is not None:
        parallelize(model, torch.device("cpu"), **prepared)
    initialize(model, torch.device("cpu"), seed=0)
    return model


def formula(model: nn.Module, cut: int, contrastive: str) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and gradients of the whole batch, written out; each pair is compared with those of its `cut` pairs."""
    images, rows = global_batch()
    whole = torch.tensor(rows)  # [n, 17]
    keys = fold_in(derive_seed(SEED), torch.arange(PAIRS))
    output = model(images, whole[:, :-1], sample_keys=keys)
    log_p = output.logits.log_softmax(-1).gather(2, whole[:, 1:].unsqueeze(2))[..., 0]  # [n, 16]
    learned = (whole[:, 1:] != 0) & (whole[:, 1:] != 511)  # neither PAD nor CLS
    captioning = -log_p[learned].mean()
    losses = []
    for image, text in zip(output.image_embeddings.split(cut), output.text_embeddings.split(cut), strict=True):
        z = image @ text.T * output.scale  # [cut, cut]
        if contrastive == "softmax":
            losses.append((z.logsumexp(0) + z.logsumexp(1) - 2 * z.diag()).mean())
        else:
            z, match = z + output.bias, torch.eye(len(z), dtype=torch.bool)
            losses.append(torch.where(match, 1 + (-z).exp(), 1 + z.exp()).log().sum() / len(z))
    contrast = torch.stack(losses).mean()
    model.zero_grad(set_to_none=True)
    (2 * contrast + captioning).backward()
    return [x.item() for x in (2 * contrast + captioning, contrast, captioning)], gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def measured(cases: list[dict[str, Any]] = CASES, **prepared: Any) -> list[dict[str, Any]]:
    """A row for each case and each size of micro-batches that this number of processes can have."""
    rows, sizes = [], [2**i for i in range(5) if 2**i * dist.get_world_size() <= PAIRS]
    for learned, dropout in sorted({(case["learned"], case["dropout"]) for case in cases}):
        plain, ours = (a_model(learned=learned, dropout=dropout, prepared=how) for how in (None, prepared))
        chosen = [case for case in cases if (case["learned"], case["dropout"]) == (learned, dropout)]
        of_formula = functools.cache(functools.partial(formula, plain))  # global negatives: one for all sizes
        for case, size in product(chosen, sizes):
            loss = {key: case[key] for key in ("contrastive", "negatives")}
            if loss["negatives"] == "local" and size == 1:
                continue  # a pair alone has nothing to be contrasted with
            ours.zero_grad(set_to_none=True)
            found = global_batch_step(ours, micro_batches(size), SEED, **loss).read()
            mine = gradients(ours)
            if dist.get_rank() > 0:
                continue  # rank 0 compares
            losses, exact = of_formula(size if loss["negatives"] == "local" else PAIRS, loss["contrastive"])
            assert mine.keys() == exact.keys()
            largest = max(g.abs().max() for g in exact.values())
            rows.append(
                {
                    **case,
                    "micro_batch_size": size,
                    "losses": max(abs(a - b) / abs(b) for a, b in zip(found[:3], losses, strict=True)),
                    "gradients": max(
                        ((mine[name] - g).abs().max() / max(g.abs().max(), 1e-3 * largest)).item()
                        for name, g in exact.items()
                    ),
                }
            )
    return rows


def main() -> None:
    with process_group():
        rows = measured(**json.loads(sys.argv[1]))
        gc.collect()
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
