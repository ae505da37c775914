"""Counters: what waits and what does not, against torch's own counts, and a training step that never waits."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grr.training.counters import Counters, GraphCounter, count, flop_counter, host_calls

X = torch.arange(6.0).reshape(2, 3)
MASK = X > 2
WAITS = {
    "item": lambda: X.sum().item(),
    "int": lambda: int(X.sum()),
    "if": lambda: 1 if MASK.any() else 0,
    "tolist": X.tolist,
    "cpu": X.cpu,
    "numpy": X.numpy,
    "nonzero": MASK.nonzero,
    "one-argument where": lambda: torch.where(MASK),
    "unique": X.unique,
    "masked_select": lambda: X.masked_select(MASK),
    "bincount": X.long().flatten().bincount,
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "reading by a mask": lambda: X[MASK],
    "adding by a mask": lambda: X.clone().index_put((MASK,), torch.zeros(3)),
    "torch.tensor": lambda: torch.tensor([1.0, 2.0], device=X.device),
}
NO_WAITS = {
    "reading by index": lambda: X[torch.arange(2), torch.arange(2)],
    "masked_fill": lambda: X.masked_fill(MASK, 0.0),
    "three-argument where": lambda: torch.where(MASK, X, 0.0),
    "full": lambda: torch.full((2,), 3.0),
    "a number as a factor": lambda: X * 2.5,
    "another dtype": X.bfloat16,
    "topk": lambda: X.topk(2),
}


@pytest.mark.parametrize("way", WAITS)
def test_each_way_to_wait_is_counted_with_its_line(way):
    with Counters() as counters:
        WAITS[way]()
    assert sum(counters.waits.values()) == 1
    assert "at test_counters.py:" in next(iter(counters.waits))


@pytest.mark.parametrize("way", NO_WAITS)
def test_what_stays_on_the_device_does_not_wait(way):
    with Counters() as counters:
        NO_WAITS[way]()
    assert counters.waits == {}


def test_a_wait_in_a_backward_pass_is_counted():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    x = torch.ones(3, requires_grad=True)
    with Counters() as counters:
        Reads.apply(x).sum().backward()
    assert list(counters.waits.values()) == [1]


def test_views_are_not_operations():
    with Counters() as counters:
        X.view(3, 2).transpose(0, 1)[0].unsqueeze(0).expand(4, 3)
    assert counters.operations == {}
    with Counters() as counters:
        (X + 1).mul_(2).sum()
    assert counters.operations == {"add": 1, "mul_": 1, "sum": 1}


@pytest.mark.parametrize(("rows", "width", "hidden"), [(8, 16, 24), (8, 16, 23), (5, 16, 24)])
def test_the_flops_of_products_are_torchs_and_those_off_8_are_named(rows, width, hidden):
    layers = nn.Sequential(nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False))
    x = torch.randn(rows, width)
    with FlopCounterMode(display=False) as flops, Counters() as counters:
        layers(x).sum().backward()
    assert sum(counters.products.values()) == flops.get_total_flops()
    odd = bool(rows % 8 or width % 8 or hidden % 8)
    assert counters.unaligned_flops == odd * flops.get_total_flops()


def test_fused_attention_on_a_cpu_costs_what_torch_counts_for_that_of_a_gpu():
    """Two products forward, and backward four and one that computes the scores again (Dao et al. 2022)."""
    b, h, s, t, k = 2, 3, 8, 5, 16
    q, key, value = (torch.randn(b, h, n, k, requires_grad=True) for n in (s, t, t))
    with flop_counter() as flops:
        y = nn.functional.scaled_dot_product_attention(q, key, value)
    product = 2 * b * h * s * t * k
    assert flops.get_total_flops() == 2 * product
    with flop_counter() as flops:
        y.sum().backward()
    assert flops.get_total_flops() == 5 * product


def test_calls_of_python_and_c_are_counted_for_the_block_alone():
    def inner() -> int:
        return len([1, 2])

    with host_calls() as calls:
        for _ in range(5):
            inner()
    inner()
    assert sum(n for name, n in calls.items() if name.endswith("inner")) == 5
    assert calls["len"] == 5


def test_a_graph_break_is_two_graphs():
    whole, broken = GraphCounter(), GraphCounter()
    torch.compile(lambda x: (x + 1) * 2, backend=whole)(X)

    def breaks(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        if x.sum() > 0:
            x = x * 2
        return x

    torch.compile(breaks, backend=broken)(X)
    assert (whole.count, broken.count) == (1, 2)


def test_all_counts_of_a_call_are_of_that_call():
    layer = nn.Linear(16, 8)
    x = torch.randn(8, 16)
    counts = count(lambda: layer(x).sum().backward(), layer)
    assert counts.operations >= 4
    assert counts.waits == counts.collectives == counts.collective_bytes == {}
    assert counts.flops == 2 * 2 * 8 * 16 * 8  # the product, and that of the weight's gradient
    assert counts.unaligned_flops == 0
    assert counts.kept_bytes == x.nbytes
    assert counts.host_calls > 5
