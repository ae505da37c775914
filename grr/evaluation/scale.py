"""A training step on any number of GPUs, on paper: its time, memory, communication and reading, and what bounds it.

FLOPs, memory and messages are counted from the model, on tensors without memory. Rates are assumptions. Times are of
matrix products, messages and images alone, so a real step is not faster.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from grr.data import Batch
from grr.data.collate import LABEL_MULTIPLE
from grr.data.formats import joined_index
from grr.data.order.sizes import largest_divisor
from grr.parallel.bf16 import bf16_copies
from grr.parallel.blocks import blocks
from grr.parallel.memory import PART
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import process_group
from grr.training.contrast import CHUNK
from grr.training.counters import flop_counter
from grr.training.micro_batch import USABLE, count_kept_bytes
from grr.training.step import global_batch_step

PROBE = 64  # pairs of a step that is counted, where the memory is to decide the size of a micro-batch
LOSS_TENSORS = 3  # of CHUNK logits that the contrastive loss holds at a time, at most
OWN_TEXT = {"ids", "captions", "records"}  # columns of the index whose size depends on the texts


@dataclass(frozen=True)
class Assumptions:
    """What a GPU, its part of a host and the data are like; by default those of an H100 SXM and of CC12M, packed."""

    tflops: float = 989.0  # of a GPU in matrix products, at best
    reached: float = 0.35  # fraction of it that a step reaches
    memory: float = 80.0  # GB of a GPU
    gpus_per_node: int = 8  # that are linked within a machine
    inside: float = 300.0  # GB/s that a GPU sends within its machine
    between: float = 40.0  # GB/s that a GPU sends to other machines, over a network card of its own
    latency: float = 5.0  # microseconds of each message
    cores: int = 12  # of the host that read images for a GPU
    images: float = 700.0  # that a core reads a second
    columns: int | None = None  # tokens of a text, padding included; null: the context length
    text_bytes: float = 90.0  # of the id and the caption of a pair
    image_bytes: float = 49e3  # of an image file

    def __post_init__(self) -> None:
        if wrong := {key: value for key, value in vars(self).items() if value is not None and not value > 0}:
            raise ValueError(f"scale: assumptions must be above 0, got {wrong}; leave out assume.{next(iter(wrong))}")


@dataclass(frozen=True)
class Run:
    """How a training run divides its batches and its model over GPUs."""

    gpus: int
    batch_size: int  # of a step, over all GPUs
    micro_batch_size: int  # pairs that a GPU holds at a time
    dp_replicate: int = 1
    keep_gathered: bool = True
    bf16: bool = True
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    negatives: Literal["global", "local"] = "global"

    def __post_init__(self) -> None:
        if self.batch_size % (self.gpus * self.micro_batch_size) or self.gpus % self.dp_replicate:
            raise ValueError(
                "scale: batch_size must be a multiple of GPUs * micro_batch_size, and GPUs one of dp_replicate, got "
                f"batch_size={self.batch_size:,}, {self.gpus:,} GPUs, micro_batch_size={self.micro_batch_size}, "
                f"dp_replicate={self.dp_replicate}; change run.batch_size or the number of GPUs"
            )

    @property
    def micro_batches(self) -> int:
        return self.batch_size // (self.gpus * self.micro_batch_size)

    @property
    def shards(self) -> int:
        """GPUs over which a model is sharded."""
        return self.gpus // self.dp_replicate

    @property
    def embeds_first(self) -> bool:
        """Whether micro-batches are embedded twice (GradCache)."""
        return self.micro_batches > 1 and self.negatives == "global"


class Ring(NamedTuple):
    """Collectives of one kind in a step, as rings in which each process sends to the next one."""

    calls: int
    size: int  # bytes of the whole tensors of all calls
    ranks: int  # that take part
    per_node: int  # of them on one node
    passes: int = 1  # around the ring: 2 of an all-reduce

    @property
    def sent(self) -> int:
        """Bytes that a process sends, and receives, in a step."""
        return self.passes * self.size * (self.ranks - 1) // self.ranks

    def seconds(self, assumed: Assumptions) -> float:
        """Time of these calls. The ranks of a node send over all their network cards, and within the node as well."""
        between = assumed.between * self.per_node if self.ranks > self.per_node else math.inf
        messages = self.passes * self.calls * (self.ranks - 1)
        return self.sent / (1e9 * min(assumed.inside, between)) + messages * assumed.latency / 1e6


class Count(NamedTuple):
    """What a step of one process does, counted on tensors without memory."""

    kept_per_pair: float  # bytes for the backward pass
    flops_per_pair: float  # executed, recomputation included
    copies: int  # bytes of the bfloat16 copies of the weights in one process
    embedding_dim: int


class Model:
    """A model of a config on paper. build makes it; columns: tokens of a text, padding included; options: of
    `parallelize`, bf16 and activation_checkpointing."""

    def __init__(self, build: Callable[[], nn.Module], image_size: int, columns: int, **options: bool) -> None:
        self.build, self.image_size, self.columns, self.options = build, image_size, columns, options
        self._counts: dict[tuple[int, bool], Count] = {}

    @cached_property
    def meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build()

    @cached_property
    def units(self) -> list[list[nn.Parameter]]:
        """The parameters that are gathered together: those of each block, and first those outside the blocks."""
        parts = [list(block.parameters()) for block in blocks(self.meta)]
        inside = {id(p) for part in parts for p in part}
        return [[p for p in self.meta.parameters() if id(p) not in inside], *parts]

    def count(self, pairs: int, *, embeds_first: bool) -> Count:
        """Count a step of one micro-batch, or of two that are embedded first, of at least 2 pairs."""
        key = max(2, pairs), embeds_first
        if key not in self._counts:
            self._counts[key] = _count(self, *key)
        return self._counts[key]


def elements(model: Model, shards: int) -> list[int]:
    """Returns the elements of a process's shard of each unit of a model, all of whose parameters are trained.

    FSDP2 pads the first dimension of each parameter to a multiple of the number of shards.
    """
    return [sum(-(-len(p) // shards) * (p.numel() // len(p)) for p in unit) for unit in model.units]


def messages(model: Model, run: Run, *, embedding_dim: int, gpus_per_node: int = 8) -> dict[str, Ring]:
    """Returns the collectives of a step by kind, as `global_batch_step` and `clip_gradients` make them."""
    if run.gpus == 1:
        return {}
    units = elements(model, run.shards)
    passes = 1 if run.keep_gathered else run.micro_batches
    world_node, found = min(run.gpus, gpus_per_node), dict[str, Ring]()
    if run.shards == 1:  # whole models: nothing is gathered, and all gradients are one message
        units = [sum(units)]
    else:
        gathers = [passes * (1 if run.keep_gathered or i == 0 else 2) for i in range(len(units))]
        if run.embeds_first and not run.keep_gathered:
            embedding = {id(block) for name in ("vision_encoder", "text_decoder") for block in _blocks(model, name)}
            for i, block in enumerate(blocks(model.meta), start=1):
                gathers[i] += run.micro_batches * (id(block) in embedding)
        size = run.shards * (2 if run.bf16 else 4) * sum(n * unit for n, unit in zip(gathers, units, strict=True))
        shard_node = min(run.shards, gpus_per_node)
        found["weights"] = Ring(sum(gathers), size, run.shards, shard_node)
        reduced = run.shards * 4 * passes * sum(units)
        found["gradients"] = Ring(passes * len(units), reduced, run.shards, shard_node)
    if run.dp_replicate > 1:
        per_node = max(1, gpus_per_node // run.shards)
        found["replicas"] = Ring(passes * len(units), 4 * passes * sum(units), run.dp_replicate, per_node, 2)
    if run.negatives == "global":
        sums = run.contrastive == "softmax"  # log-sum-exps of rows and columns
        row = 4 * (2 * embedding_dim + 1 + 2 * sums)
        found["embeddings"] = Ring(1 + sums, run.batch_size * row, run.gpus, world_node)
    scalars = 1 + (run.negatives == "local")  # the norm, and the number of labels
    return found | {"scalars": Ring(scalars, 8 * scalars, run.gpus, world_node, 2)}


def memory(model: Model, run: Run, count: Count) -> dict[str, int]:
    """Returns the bytes that the fullest process holds in a step, by part; without what kernels need for a moment."""
    units, width = elements(model, run.shards), 2 if run.bf16 else 4
    n, whole = sum(units), run.shards * sum(units)
    found = {"weights": 4 * n, "gradients": 4 * n, "optimizer state": 8 * n}
    if run.gpus == 1:  # bfloat16 copies, and their gradients
        found |= {"gathered weights": count.copies, "whole gradients": count.copies}
    elif run.keep_gathered:
        found |= {"gathered weights": width * whole, "whole gradients": 4 * whole if run.micro_batches > 1 else 0}
    else:  # those outside the blocks; a block, and the weights of the next one
        largest = sorted(units[1:])
        found["gathered weights"] = run.shards * width * (units[0] + sum(largest[-2:]))
        found["whole gradients"] = run.shards * 4 * (units[0] + sum(largest[-1:]))
    found["activations"] = int(run.micro_batch_size * count.kept_per_pair)
    columns = run.batch_size if run.negatives == "global" else run.micro_batch_size
    rows = min(run.batch_size // run.gpus, run.micro_batch_size if run.negatives == "local" else run.batch_size)
    found["embeddings"] = 4 * columns * (2 * count.embedding_dim + 1)
    found["contrastive loss"] = 4 * LOSS_TENSORS * columns * min(rows, max(1, CHUNK // columns))
    return found


class Estimate(NamedTuple):
    """A step on paper."""

    model: Model
    run: Run
    flops: float  # of a GPU
    memory: dict[str, int]
    messages: dict[str, Ring]
    seconds: dict[str, float]  # computing, sending, reading, each alone

    @property
    def step(self) -> float:
        """Seconds of a step that hides all but the longest behind it."""
        return max(self.seconds.values())

    @property
    def exposed(self) -> float:
        """Seconds of a step that hides reading, but not sending, behind computing."""
        return max(self.seconds["computing"] + self.seconds["sending"], self.seconds["reading"])

    @property
    def bound(self) -> str:
        """What a step waits for."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that a GPU sends, and receives, by kind."""
        return {kind: ring.sent for kind, ring in self.messages.items()}

    def hours(self, pairs: int) -> float:
        """Hours of an epoch."""
        return pairs / self.run.batch_size * self.step / 3600


def estimate(model: Model, run: Run, assumed: Assumptions, *, choose: bool = False, decide: bool = False) -> Estimate:
    """Returns a step of a model on a assumed. choose: raise the micro-batch to what the memory holds, as a run with
    run.micro_batch_size=null does; decide: keep whole weights where they fit, as with parallel.keep_gathered=null.
    """
    pairs = run.batch_size // run.gpus
    if decide:
        state = 16 * sum(elements(model, run.shards))
        whole = sum(p.numel() for p in model.meta.parameters()) * (6 if run.bf16 else 8)
        run = replace(run, keep_gathered=PART * whole <= 1e9 * assumed.memory - state)
    if choose:
        probe = model.count(min(PROBE, pairs), embeds_first=False)
        fixed = sum(memory(model, replace(run, micro_batch_size=1), probe).values()) - int(probe.kept_per_pair)
        room = USABLE["cuda"] * 1e9 * assumed.memory - fixed
        run = replace(run, micro_batch_size=largest_divisor(pairs, int(room / probe.kept_per_pair)))
    count = model.count(run.micro_batch_size, embeds_first=run.embeds_first)
    flops = pairs * count.flops_per_pair
    if run.negatives == "global":  # six products of rows and columns; those of a micro-batch alone are counted already
        flops += 12 * pairs * (run.batch_size - run.micro_batch_size) * count.embedding_dim
    sent = messages(model, run, embedding_dim=count.embedding_dim, gpus_per_node=assumed.gpus_per_node)
    seconds = {
        "computing": flops / (assumed.tflops * assumed.reached * 1e12),
        "sending": sum(ring.seconds(assumed) for ring in sent.values()),
        "reading": pairs / (assumed.cores * assumed.images),
    }
    return Estimate(model, run, flops, memory(model, run, count), sent, seconds)


def index_bytes(pairs: int, text: float) -> tuple[int, int]:
    """Returns the bytes of the joined index of tar shards, and those that each process holds of a split of it.

    text: mean bytes of the id and the caption of a pair.
    """
    columns = joined_index.COLUMNS.items()
    numbers = sum(np.dtype(dtype).itemsize for name, dtype in columns if name not in OWN_TEXT)
    return int(pairs * (numbers + text)), pairs * (8 + (4 if pairs <= 2**32 else 8))


def _blocks(model: Model, name: str) -> list[nn.Module]:
    return list(blocks(getattr(model.meta, name)))


def _count(model: Model, pairs: int, embeds_first: bool) -> Count:
    """Run a step, forward and backward, on tensors that have a shape and no memory."""
    widths: list[int] = []
    with process_group(), FakeTensorMode():
        network = model.build()
        network.contrastive_pooler.register_forward_hook(lambda *call: widths.append(call[-1].shape[-1]))  # type: ignore
        parallelize(network, torch.device("cpu"), compile=False, **model.options)
        batch = _batch(pairs, model.image_size, model.columns)
        with count_kept_bytes(network) as kept, flop_counter() as flops:
            global_batch_step(network, [batch], 0)
        total = flops.get_total_flops()
        if embeds_first:
            with flop_counter() as flops:
                global_batch_step(network, [batch, batch], 0)
            total = flops.get_total_flops() / 2
        copies = sum(x.nbytes for x in bf16_copies(network))
    return Count(kept.most / pairs, total / pairs, copies, widths[0])


def _batch(pairs: int, image_size: int, columns: int) -> Batch:
    """Returns a batch of captions as long as the columns, in which every token but EOS and CLS has a label."""
    labels = pairs * (columns - 2)
    padded = -(-labels // LABEL_MULTIPLE) * LABEL_MULTIPLE
    ids, numbers = torch.zeros(pairs, columns, dtype=torch.int64), torch.zeros(padded, dtype=torch.int64)
    images = torch.zeros(pairs, 3, image_size, image_size, dtype=torch.uint8)
    return Batch(images, ids, ids, ids[:, 0], numbers, numbers, labels, [""] * pairs, 0)
