"""The cost of a run is scaled from a measured step, and an error in that step does not stop a check."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from grr.data import Pairs
from grr.data.images import BadImage
from grr.data.pairs import Texts
from grr.models.builders import grr_coca
from grr.parallel.memory import free_memory
from grr.tokenizers import train_tokenizer
from grr.training.cost import RunPlan, StepCost, _memory, _time, run_cost

SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "dim": 32,
    "num_heads": 2,
    "vision_layers": 1,
    "text_layers": 1,
    "multimodal_layers": 1,
}


class Grey(Pairs):
    """Twelve images of one grey each, or none that can be read."""

    def __init__(self, *, readable: bool = True) -> None:
        super().__init__(Texts.of(map(str, range(12))), Texts.of(f"fox {i}" for i in range(12)), np.arange(12))
        self.readable = readable

    def load(self, i: int, *, size: int, crop: str) -> torch.Tensor:
        if not self.readable:
            raise BadImage("torn")
        return torch.full((3, size, size), 20 * i, dtype=torch.uint8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(
        ["fox 0123456789"], tmp_path_factory.mktemp("words") / "t.model", vocab_size=40, context_length=16
    )


def planned(folder: Path, **changes) -> RunPlan:
    plan = {
        "folder": folder,
        "batch_size": 8,
        "micro_batch_size": 4,
        "processes": 1,
        "steps": 30,
        "keep": 2,
        "dp_replicate": 1,
        "workers": 2,
        "optimizer": {"lr": 1e-3},
        "loss": {"negatives": "global"},
    }
    return RunPlan(**plan | changes)


def findings(folder: Path, tokenizer, build=None, pairs: Pairs | None = None, **changes):
    build = build or (lambda: grr_coca(vocab_size=tokenizer.vocab_size, context_length=16, **SIZES))
    pairs = pairs or Grey()
    costs = run_cost(planned(folder, **changes), build, pairs, tokenizer, image_size=16, crop="squash")
    return {finding.what: finding for finding in costs}


def test_a_step_of_a_micro_batch_is_timed_and_leaves_no_files(tmp_path, tokenizer):
    found = findings(tmp_path / "runs/new", tokenizer)
    assert set(found) == {"disk", "time", "memory"}
    assert not any(finding.wrong for finding in found.values())
    assert re.search(r"for 30 steps .* s per step of 8 pairs, scaled from one of 4 in ", found["time"].message)
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()


def test_a_weight_takes_16_bytes_in_memory_and_12_in_a_checkpoint(tmp_path, tokenizer):
    model = grr_coca(vocab_size=tokenizer.vocab_size, context_length=16, **SIZES)
    n = sum(p.numel() for p in model.parameters())
    found = findings(tmp_path, tokenizer)
    assert f"{16 * n / 1e6:.1f} MB of weights, gradients and optimizer state" in found["memory"].message
    assert f"checkpoints of {12 * n / 1e6:.1f} MB" in found["disk"].message
    assert f"at most {(6 * 12 + 4) * n / 1e6:.1f} MB" in found["disk"].message


def test_more_layers_keep_more_activations(tmp_path, tokenizer):
    def kept(layers: int) -> float:
        sizes = SIZES | {"vision_layers": layers}
        build = functools.partial(grr_coca, vocab_size=tokenizer.vocab_size, context_length=16, **sizes)
        found = findings(tmp_path, tokenizer, build)
        return float(re.search(r"([\d.]+) MB of activations", found["memory"].message)[1])

    assert kept(1) < kept(3) < kept(9)


def test_a_model_that_cannot_be_built_is_a_fault(tmp_path, tokenizer):
    found = findings(tmp_path, tokenizer, lambda: grr_coca(dim=10, num_heads=3))
    assert found["model"].wrong
    assert found["model"].message.startswith("it cannot be built: ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pairs": Grey(readable=False)}, "not measured: a step failed (data: no readable sample"),
        ({"optimizer": {"betas": (2.0, 0.9)}}, "not measured: a step failed (Invalid beta parameter"),
    ],
)
def test_a_step_that_fails_is_a_finding(tmp_path, tokenizer, changes, reason):
    found = findings(tmp_path, tokenizer, **changes)
    assert found["time"].message.startswith(reason)
    assert not dist.is_initialized()


def test_a_model_that_is_too_large_for_this_machine_is_not_built(tmp_path, tokenizer):
    built = []

    def build() -> torch.nn.Module:
        built.append(torch.empty(0).device.type)
        if built[-1] != "meta":
            raise AssertionError("it was built")
        return torch.nn.Linear(10**5, free_memory() // 10**5)  # 16 bytes a weight

    found = findings(tmp_path, tokenizer, build)
    assert "not measured: weights, gradients and optimizer state take" in found["time"].message
    assert found["disk"].wrong == ("lower saving.keep" in found["disk"].message)
    assert built == ["meta"]


def test_a_model_that_is_too_slow_for_this_machine_is_not_built(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("grr.training.cost._flops_per_second", lambda: 1000.0)
    found = findings(tmp_path, tokenizer)
    assert re.match(r"not measured: a step of 2 pairs may take [\d,]+ s on this machine", found["time"].message)


seconds = st.floats(1e-3, 1e3)


@given(
    batch=st.sampled_from([64, 128]),
    micro=st.sampled_from([16, 64, 128]),
    processes=st.sampled_from([1, 2]),
    steps=st.integers(1, 9999),
    computing=seconds,
    reading=seconds,
    updating=seconds,
    negatives=st.sampled_from(["global", "local"]),
)
def test_the_minutes_follow_the_slower_of_computing_and_reading(
    batch, micro, processes, steps, computing, reading, updating, negatives
):
    run = planned(
        Path("x"),
        batch_size=batch,
        micro_batch_size=micro,
        processes=processes,
        steps=steps,
        loss={"negatives": negatives},
    )
    text = _time(run, StepCost(16, computing, reading, updating, 0.0)).message
    share = batch / processes / 16
    again = share * 16 > micro and negatives == "global"  # embeddings first, then each micro-batch again
    slow = share * computing * (4 / 3 if again else 1) + updating
    expected = max(slow, share * reading / 2)
    assert f"{expected:.2g} s per step of {batch} pairs" in text
    stated = re.match(r"about (a minute|([\d,]+) (minutes|hours)) for ", text)
    minutes = expected * steps / 60
    if stated[2] is None:
        assert minutes < 1
    else:
        number = int(stated[2].replace(",", ""))
        assert abs(number - minutes / (60 if stated[3] == "hours" else 1)) <= 1
    assert ("raise loader.workers" in text) == (share * reading / 2 > slow)


@given(state=st.integers(1, 10**12), kept=st.floats(0, 1e10), micro=st.integers(1, 99), processes=st.integers(1, 9))
def test_too_little_memory_is_marked(state, kept, micro, processes):
    run = planned(Path("x"), micro_batch_size=micro, processes=processes)
    finding = _memory(run, state, StepCost(2, 1.0, 1.0, 1.0, kept), 10**10)
    assert finding.wrong == (state / processes + kept * micro > 10**10)
