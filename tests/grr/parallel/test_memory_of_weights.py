"""Weights and gradients stay whole through a step where they take at most a quarter of the free memory."""

import logging

import pytest
import torch
from torch import nn

from grr.parallel.memory import free_memory_of_process, has_room_for_whole

CPU = torch.device("cpu")


def a_model(gigabytes: float, *, trained: bool = True) -> nn.Module:
    """A model without memory, of float32 weights of that size."""
    return nn.Linear(1000, int(gigabytes * 1e9) // 4000, bias=False, device="meta").requires_grad_(trained)


@pytest.mark.usefixtures("process_group")
def test_a_model_stays_whole_where_weights_and_gradients_take_a_quarter_of_the_free_memory(monkeypatch, caplog):
    monkeypatch.setattr("grr.parallel.memory.free_memory", lambda: 8 * 10**9)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with caplog.at_level(logging.INFO, logger="grr.parallel.memory"):
        assert has_room_for_whole(a_model(1.0), CPU, bf16=False)  # 1 GB of weights and 1 GB of gradients
    assert "keep_gathered=true: whole weights and gradients take 2 GB in a process, of 8 GB free" in caplog.text
    assert not has_room_for_whole(a_model(1.01), CPU, bf16=False)
    assert has_room_for_whole(a_model(1.3), CPU, bf16=True)
    assert not has_room_for_whole(a_model(1.34), CPU, bf16=True)
    assert has_room_for_whole(a_model(2.0, trained=False), CPU, bf16=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of which each has half the memory
    assert has_room_for_whole(a_model(0.5), CPU, bf16=False)
    assert not has_room_for_whole(a_model(0.51), CPU, bf16=False)


@pytest.mark.usefixtures("process_group")
def test_the_free_memory_of_this_machine_decides():
    free = free_memory_of_process(CPU) / 1e9
    assert has_room_for_whole(a_model(free / 20), CPU, bf16=False)
    assert not has_room_for_whole(a_model(free), CPU, bf16=False)
