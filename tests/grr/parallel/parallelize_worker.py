"""What test_parallelize.py measures in one process and in two: every way to prepare a model, on one global batch.

torchrun --nproc_per_node N parallelize_worker.py, or plain python for one process. Rank 0 prints as JSON, for each
subset of the options, how far its losses and gradients are from those of the plain model in float64, which reads the
whole batch at once and holds all logits; and prints the same as a table.
"""

import functools
import gc
import itertools
import json
import sys
from contextlib import AbstractContextManager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grr.components import fold_in
from grr.data import Batch
from grr.data.collate import IGNORE, collate_captions
from grr.models.builders import grr_coca
from grr.models.head import CHUNK
from grr.parallel.float8 import multiply_in_float8
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import process_group
from grr.seeds import derive_seed
from grr.training.loss import captioning_loss, contrastive_loss
from grr.training.step import global_batch_step

SIZES = {
    "vocab_size": 512,
    "context_length": 64,
    "image_size": 32,
    "patch_size": 16,
    "dim": 32,
    "num_heads": 2,
    "vision_layers": 1,
    "text_layers": 1,
    "multimodal_layers": 1,
    "vision_ffn_multiplier": 2.5,
    "dropout": 0.2,
}
PAIRS, MICRO_BATCHES, SEED = 288, 2, 7  # two micro-batches of each of up to two processes
OPTIONS = {"bf16": True, "compile": True, "activation_checkpointing": True, "float8": True}
SUBSETS = [dict(chosen) for n in range(5) for chosen in itertools.combinations(OPTIONS.items(), n)]
PAIRWISE = (0, 1, 9, 10, 11, 15)  # of them, in which any two options are both on, both off, and each on alone


def global_batch() -> tuple[Tensor, list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    lengths = torch.randint(58, 62, (PAIRS,), generator=generator).tolist()
    tokens = [torch.randint(3, 510, (n,), generator=generator).tolist() for n in lengths]
    return images, [[510, *t, 1, *[0] * (61 - len(t)), 511, 0] for t in tokens]


def micro_batches() -> list[Batch]:
    """Those of this process, as the loader cuts them, each of more labelled tokens than a chunk of the head."""
    images, rows = global_batch()
    rank, world = dist.get_rank(), dist.get_world_size()
    size = PAIRS // (MICRO_BATCHES * world)
    starts = [(i * world + rank) * size for i in range(MICRO_BATCHES)]
    batches = [Batch(images[s : s + size], *collate_captions(rows[s : s + size]), [""] * size, 0) for s in starts]
    assert all(batch.num_labels > CHUNK for batch in batches)
    return batches


def emulated_float8() -> AbstractContextManager[object]:
    """Let `parallelize` emulate float8, which a CPU lacks."""
    emulated = functools.partial(multiply_in_float8, emulated=True)
    return mock.patch("grr.parallel.parallelize.multiply_in_float8", emulated)


def built(**prepared: object) -> nn.Module:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch.device("meta"):
        model = grr_coca(**SIZES)
    with emulated_float8():
        parallelize(model, torch.device("cpu"), **prepared)
    initialize(model, torch.device("cpu"), seed=0)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).double() for name, g in found.items()}


def expected() -> tuple[list[float], dict[str, Tensor]]:
    """The losses and gradients by the formulas, in float64; every process computes all of them."""
    with torch.device("meta"):
        model = grr_coca(**SIZES)
    initialize(model, torch.device("cpu"), seed=0)
    model = model.double()
    images, rows = global_batch()
    ids, following = torch.tensor(rows)[:, :-1], torch.tensor(rows)[:, 1:]
    output = model(
        images.double().div(255).sub(MEAN).div(STD), ids, sample_keys=fold_in(derive_seed(SEED), torch.arange(PAIRS))
    )
    contrast = contrastive_loss(output.image_embeddings, output.text_embeddings, 0.07)
    captioning = captioning_loss(output.logits, following.masked_fill((following == 0) | (following == 511), IGNORE))
    (2 * contrast + captioning).backward()
    return [x.item() for x in (2 * contrast + captioning, contrast, captioning)], gradients(model)


MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def differences(options: dict[str, object], losses: list[float], exact: dict[str, Tensor]) -> tuple[float, float]:
    """The largest relative difference of a loss, and of a parameter's gradient, of a model prepared with options.

    A gradient smaller than a hundredth of all of them together, such as that of a key's bias, which is rounding alone,
    is compared with that hundredth.
    """
    model = built(**options)
    found = global_batch_step(model, micro_batches(), SEED).read()
    ours = gradients(model)
    assert ours.keys() == exact.keys()
    assert ("compile" in options) == (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0)
    least = 1e-2 * torch.stack([g.norm() for g in exact.values()]).norm()
    of_losses = max(abs(a - b) / b for a, b in zip(found[:3], losses, strict=True))
    return of_losses, max(((ours[name] - g).norm() / max(g.norm(), least)).item() for name, g in exact.items())


def main() -> None:
    with process_group():
        torch.compile = functools.partial(torch.compile, backend="aot_eager")  # all of a compilation but its kernels
        losses, exact = expected()
        result = []
        for options in SUBSETS if dist.get_world_size() == 1 else [SUBSETS[i] for i in PAIRWISE]:
            of_losses, of_gradients = differences(options, losses, exact)
            result.append({"options": list(options), "losses": of_losses, "gradients": of_gradients})
            gc.collect()
        if dist.get_rank() == 0:
            for row in result:
                name = " ".join(row["options"]) or "plain"
                print(f"{name:<45} {row['losses']:.1e} {row['gradients']:.1e}", file=sys.stderr)
            print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
