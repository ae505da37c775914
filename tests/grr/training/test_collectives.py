"""A step gathers weights and embeddings once and reduces gradients once, however many micro-batches it has."""

import functools
import json
from functools import partial
from pathlib import Path

import pytest
from collectives_worker import PAIRS
from programs import run

from grr.evaluation.scale import Model, Ring, Run, messages
from grr.models.builders import grr_coca_tiny

WORKER = Path(__file__).parent / "collectives_worker.py"
WAYS = [(2, 1), (4, 2)]  # processes, copies of the model


@functools.cache
def measured(processes: int, dp_replicate: int) -> list[dict]:
    done = run([str(WORKER), json.dumps({"dp_replicate": dp_replicate})], processes=processes, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def rows(processes: int, dp_replicate: int, *, keep_gathered: bool) -> list[dict]:
    found = [row for row in measured(processes, dp_replicate) if row["keep_gathered"] == keep_gathered]
    assert {row["micro"] for row in found} == {1, 4}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "dp_replicate"), WAYS)
def test_weights_are_gathered_once_and_gradients_reduced_once(processes, dp_replicate):
    for row in rows(processes, dp_replicate, keep_gathered=True):
        local = row["negatives"] == "local"
        expected = {
            "weights": row["parts"],
            "gradients": row["parts"],
            # the norm; of local negatives, the number of labels; and the gradients of each part, over the copies
            "all_reduce": 1 + local + (row["parts"] if dp_replicate > 1 else 0),
        }
        if not local:  # the embeddings, and the log-sum-exps of their rows
            expected["all_gather"] = 2 if row["contrastive"] == "softmax" else 1
        assert row["counts"] == expected, row
        assert row["parts"] == 7
        assert row["sharded"]


@pytest.mark.slow
def test_without_the_memory_each_micro_batch_gathers_and_reduces():
    for row in rows(2, 1, keep_gathered=False):
        assert row["counts"]["gradients"] == row["micro"] * row["parts"], row
        assert row["counts"]["weights"] > row["micro"] * row["parts"], row
        assert row["sharded"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "dp_replicate"), WAYS)
def test_the_bytes_of_weights_and_gradients_are_those_of_the_model(processes, dp_replicate):
    parameters = sum(p.numel() for p in grr_coca_tiny(learned_temperature=True).parameters())
    for row in rows(processes, dp_replicate, keep_gathered=True):  # shards of one size are a little more
        assert row["bytes"]["weights"] == pytest.approx(2 * parameters, rel=1e-3), row  # bfloat16
        assert row["bytes"]["gradients"] == pytest.approx(4 * parameters, rel=1e-3), row  # float32


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "dp_replicate"), WAYS)
def test_the_messages_on_paper_are_those_of_gloo(processes, dp_replicate):
    model = Model(partial(grr_coca_tiny, learned_temperature=True), 32, 16, bf16=True)
    for row in measured(processes, dp_replicate):
        kinds = {key: row[key] for key in ("keep_gathered", "contrastive", "negatives")}
        run = Run(processes, processes * PAIRS * row["micro"], PAIRS, dp_replicate, **kinds)
        paper = messages(model, run, embedding_dim=grr_coca_tiny().dim)
        none = Ring(0, 0, 1, 1)
        replicas = paper.get("replicas", none)
        passes = 1 if run.keep_gathered else run.micro_batches  # that reduce gradients
        once = passes - 1 if run.embeds_first else 0  # of them compute no contrastive loss, so no gradient of its
        absent = 4 * run.shards * (once + (passes if run.contrastive == "softmax" else once))  # temperature and bias
        assert (row["counts"]["weights"], row["bytes"]["weights"]) == paper["weights"][:2], row
        sent = paper["gradients"].size - absent
        assert (row["counts"]["gradients"], row["bytes"]["gradients"]) == (paper["gradients"].calls, sent), row
        embeddings, scalars = paper.get("embeddings", none), paper["scalars"]
        assert row["counts"].get("all_gather", 0) == embeddings.calls, row
        assert row["bytes"].get("all_gather", 0) * processes == embeddings.size, row  # counted by a process's rows
        assert row["counts"]["all_reduce"] == scalars.calls + replicas.calls, row
        reduced = replicas.size - (absent // run.shards if replicas.calls else 0)
        assert row["bytes"]["all_reduce"] == scalars.size + reduced, row
