"""The scale on paper, part by part, against what is counted in real steps: messages, memory, FLOPs.

Steps of up to 1,024 ranks run in one process, on torch's fake backend, whose collectives do nothing.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grr.evaluation.flops import step_flops
from grr.evaluation.scale import (
    LOSS_TENSORS,
    Assumptions,
    Count,
    Model,
    Ring,
    Run,
    estimate,
    memory,
    messages,
)
from grr.models.builders import grr_coca_tiny
from grr.parallel.bf16 import bf16_copies
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import process_group
from grr.parallel.shard import local
from grr.training import contrast, micro_batch
from grr.training.counters import Counters, flop_counter
from grr.training.optim import adamw, clip_gradients
from grr.training.random_batches import random_batches
from grr.training.step import global_batch_step

CPU = torch.device("cpu")
ARGUMENTS = {"vocab_size": 515, "context_length": 16, "dim": 60, "num_heads": 2, "dropout": 0.1}
SIZES = {"vocab_size": 515, "context_length": 16, "image_size": 32}
build = partial(grr_coca_tiny, **ARGUMENTS)
PAPER = Model(build, 32, 16, bf16=True)


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """This process as rank 0 of so many, which do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


def trained(run: Run):
    """A sharded model and its optimizer after a step, and the collectives of a second one: calls, bytes."""
    with torch.device("meta"):
        model = build()
    prepared = {"bf16": run.bf16, "keep_gathered": run.keep_gathered, "dp_replicate": run.dp_replicate}
    parallelize(model, CPU, compile=False, **prepared)
    initialize(model, CPU, seed=0)
    optimizer = adamw(model)
    batches = random_batches(run.micro_batches, batch_size=run.micro_batch_size, **SIZES)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        with Counters() as counters:
            global_batch_step(model, batches, 0, contrastive=run.contrastive, negatives=run.negatives)
            clip_gradients(model, 1.0)
        optimizer.step()
    return model, optimizer, (counters.collectives, counters.collective_bytes)


def assert_counted(found: dict[str, Ring], run: Run, calls: Counter, sizes: Counter) -> None:
    """Compare calls and bytes with those that were dispatched; all-gathers were counted by the rows of one rank."""
    none = Ring(0, 0, 1, 1)
    weights, gradients, rows = (found.get(kind, none) for kind in ("weights", "gradients", "embeddings"))
    assert (calls["_allgather_base_"], sizes["_allgather_base_"]) == weights[:2]
    assert (calls["_reduce_scatter_base_"], sizes["_reduce_scatter_base_"]) == gradients[:2]
    assert (calls["allgather_"], sizes["allgather_"] * run.gpus) == rows[:2]
    reduced = [found.get(kind, none) for kind in ("replicas", "scalars")]
    assert calls["allreduce_"] == sum(ring.calls for ring in reduced)
    assert sizes["allreduce_"] == sum(ring.size for ring in reduced)


runs = st.builds(
    lambda gpus, nodes, micro, passes, **kinds: Run(
        gpus, gpus * micro * passes, micro, dp_replicate=min(nodes, gpus), **kinds
    ),
    st.sampled_from([2, 4, 8, 64, 256, 1024]),
    st.sampled_from([1, 1, 2, 128]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2, 3]),
    keep_gathered=st.booleans(),
    bf16=st.booleans(),
    contrastive=st.sampled_from(["softmax", "sigmoid"]),
    negatives=st.sampled_from(["global", "global", "local"]),
)


@given(run=runs.filter(lambda run: run.negatives == "global" or run.micro_batch_size > 1))
@example(run=Run(4, 24, 2, dp_replicate=4, keep_gathered=False))  # whole models
@example(run=Run(8, 48, 2, dp_replicate=2, keep_gathered=False))
@settings(
    max_examples=8, phases=(Phase.explicit, Phase.generate)
)  # an example takes a second: no search for a smaller one
def test_messages_shards_and_states_are_those_of_a_step_on_any_number_of_ranks(run):
    paper = Model(build, 32, 16, bf16=run.bf16)
    with fake_ranks(run.gpus):
        model, optimizer, counters = trained(run)
        shards = [local(p).numel() for p in model.parameters()]
        gradients = [local(p.grad).nbytes for p in model.parameters()]
        states = [local(x).nbytes for state in optimizer.state.values() for x in state.values() if x.dim()]
        del model, optimizer
    assert_counted(messages(paper, run, embedding_dim=ARGUMENTS["dim"]), run, *counters)
    held = memory(paper, run, Count(0.0, 0.0, 0, ARGUMENTS["dim"]))
    found = tuple(held[part] for part in ("weights", "gradients", "optimizer state"))
    assert found == (4 * sum(shards), sum(gradients), sum(states))


@pytest.mark.parametrize(
    ("bf16", "checkpointing", "pairs", "embeds_first"),
    [  # every two options in all combinations
        (False, False, 6, False),
        (True, True, 6, False),
        (False, True, 6, True),
        (True, False, 6, True),
        (False, True, 90, False),
        (True, False, 90, False),
    ],
)
def test_flops_and_kept_bytes_on_paper_are_those_of_a_real_step(bf16, checkpointing, pairs, embeds_first):
    options = {"bf16": bf16, "activation_checkpointing": checkpointing}
    count = Model(build, 32, 16, **options).count(pairs, embeds_first=embeds_first)
    batches = random_batches(1 + embeds_first, batch_size=pairs, **SIZES)
    with process_group():
        with torch.device("meta"):
            model = build()
        parallelize(model, CPU, compile=False, **options)
        initialize(model, CPU, seed=0)
        with flop_counter() as flops:
            global_batch_step(model, batches, 0)
        with micro_batch.count_kept_bytes(model) as kept:
            global_batch_step(model, batches[:1], 0)
    assert count.copies == sum(x.nbytes for x in bf16_copies(model))
    assert len(batches) * pairs * count.flops_per_pair == flops.get_total_flops()
    assert pairs * count.kept_per_pair == pytest.approx(kept.most, rel=0.02)
    needed = step_flops(grr_coca_tiny, batches, **ARGUMENTS) / (len(batches) * pairs)
    most = 1 + 0.34 * embeds_first + 0.34 * checkpointing
    assert 1 <= count.flops_per_pair / needed < most + 0.05


class Alive(TorchDispatchMode):
    """The most bytes that are alive at once, of tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and id(storage := x.untyped_storage()) not in self.alive:
                self.alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id(storage))
        self.most = max(self.most, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_contrastive_loss_holds_so_many_chunks_of_logits(kind, monkeypatch):
    rows, e, chunk = 1024, 8, 2**16
    monkeypatch.setattr(contrast, "CHUNK", chunk)
    image, text = (torch.nn.functional.normalize(torch.randn(rows, e), dim=1).requires_grad_() for _ in range(2))
    columns = contrast.Columns(image.detach(), text.detach())
    with Alive() as alive:
        contrast.contrast(image, text, torch.ones(1), torch.ones(1), columns, kind=kind).backward()
    assert 4 * chunk < alive.most <= 4 * LOSS_TENSORS * chunk + 16 * image.nbytes


def on_paper(gpus: int, **changes):
    return estimate(PAPER, Run(gpus, 4096, 4), Assumptions(**changes), choose=True, decide=True)


def test_twice_the_rate_takes_half_the_time_and_the_longest_part_bounds_the_step():
    one, two = on_paper(8), on_paper(8, tflops=2 * 989.0, images=1400.0)
    for kind in ("computing", "reading"):
        assert one.seconds[kind] == pytest.approx(2 * two.seconds[kind])
    assert one.seconds["reading"] == pytest.approx(4096 / 8 / (12 * 700))
    assert on_paper(8, images=1e-3).bound == "reading"
    assert on_paper(8, between=1e-9, gpus_per_node=4).bound == "sending"
    assert on_paper(1, tflops=1e-9).bound == "computing"
    assert one.hours(2 * 10**7) == pytest.approx(2 * one.hours(10**7))


@given(ranks=st.sampled_from([2, 8, 16, 1024]), size=st.integers(0, 10**12), passes=st.sampled_from([1, 2]))
def test_a_ring_sends_what_each_rank_lacks_and_crosses_nodes_over_all_their_cards(ranks, size, passes):
    ring = Ring(1, size, ranks, min(ranks, 8), passes)
    assert ring.sent == passes * size * (ranks - 1) // ranks
    machine = Assumptions(latency=1e-9, inside=300.0, between=10.0)
    rate = 300e9 if ranks <= 8 else 80e9
    assert ring.seconds(machine) == pytest.approx(ring.sent / rate, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("room", [0.02, 0.05, 0.2])
def test_the_chosen_micro_batch_is_the_largest_that_fits(room):
    found = on_paper(8, memory=room)
    size = found.run.micro_batch_size
    assert 512 % size == 0
    assert size in (1, 512) or sum(found.memory.values()) < 1.05 * 0.9e9 * room
    larger = [n for n in range(size + 1, 513) if 512 % n == 0]
    kept = found.memory["activations"] / size
    assert not larger or sum(found.memory.values()) + (larger[0] - size) * kept > 0.85e9 * room


def test_what_does_not_divide_is_refused_with_the_values():
    with pytest.raises(ValueError, match=r"batch_size=768, 1,024 GPUs, micro_batch_size=1"):
        Run(1024, 768, 1)
    with pytest.raises(ValueError, match=r"got \{'tflops': 0\}"):
        Assumptions(tflops=0)


def test_memory_names_what_a_process_holds_when_weights_are_kept_and_micro_batches_are_many():
    model = PAPER
    count, n = model.count(4, embeds_first=False), sum(p.numel() for p in model.meta.parameters())
    kept = memory(model, Run(2, 32, 4), count)
    blockwise = memory(model, Run(2, 32, 4, keep_gathered=False), count)
    assert kept["gathered weights"] == pytest.approx(2 * n, rel=0.01)
    assert kept["whole gradients"] == pytest.approx(4 * n, rel=0.01)
    assert blockwise["gathered weights"] < kept["gathered weights"]
    assert memory(model, Run(1, 32, 4), count)["weights"] == 4 * n
