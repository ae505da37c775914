"""Clipping is torch's clip_grad_norm_, with one all-reduce and without reading the norm."""

import json
from pathlib import Path

import pytest
import torch
from programs import run
from torch import nn

from grr.training.optim import clip_gradients

WORKER = Path(__file__).parent / "clip_worker.py"
TOLERANCE = {"float32": 1e-6, "float64": 1e-12, "bfloat16": 2e-2}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_clipping_is_that_of_torch_for_any_placement_and_dtype_with_one_all_reduce(processes):
    done = run([str(WORKER)], processes=processes)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    rows = json.loads(lines[0].removeprefix("RESULT "))
    assert len(rows) == (15 if processes == 1 else 30)
    for row in rows:
        expected = pytest.approx(float(row["expected"]), rel=TOLERANCE[row["dtype"]], nan_ok=True)
        assert float(row["norm"]) == expected, row
        sharded = row["placement"] != "plain" and row["gradients"] != "none"
        assert (row["all_reduces"], row["others"]) == (sharded, 0), row


@pytest.mark.usefixtures("process_group")
def test_the_norm_is_not_read():
    """Reading it would wait for the GPU; a meta tensor has no value, and an error is raised where one is read."""
    layer = nn.Linear(3, 4, device="meta")
    for p in layer.parameters():
        p.grad = torch.empty_like(p)
    assert clip_gradients(layer, 1.0).device.type == "meta"
