"""Moments of few bits: close to those of AdamW, much smaller, and back from a checkpoint bit for bit."""

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_bit_worker import trained, update
from torch import Tensor, nn

from grr.checkpoint.training_state import load_checkpoint, save_checkpoint
from grr.models.builders import grr_coca, grr_coca_tiny
from grr.training import low_bit
from grr.training.loss import contrastive_loss
from grr.training.low_bit import BLOCK, LARGEST_BLOCK, MOMENTS, SMALLEST_BLOCK, SMALLEST_TENSOR, Bits
from grr.training.optim import adamw

optim = pytest.importorskip("torchao.optim", reason='pip install "grr-coca[quantize]"')
BITS: tuple[Bits, ...] = get_args(Bits)
WORKER = Path(__file__).with_name("low_bit_worker.py")
LARGEST_ERROR = {  # half the widest step of a format, where 1 is the largest number of a block
    ("8bit", "exp_avg"): 0.45 / 64,  # from 0.1 to 1 in 64 steps; the squares, without a sign, in 128
    ("8bit", "exp_avg_sq"): 0.45 / 128,
    ("4bit", "exp_avg"): 0.9 / 8,  # -1 itself is no entry, the last one is half a step away from it
    ("4bit", "exp_avg_sq"): 1 / 16,  # 0 is no entry, the first one is 1/16
    ("fp8", "exp_avg"): 16 / 448,
    ("fp8", "exp_avg_sq"): 16 / 448,
}


def moment(optimizer: torch.optim.Optimizer, p: nn.Parameter, name: str) -> Tensor:
    """As the next update will read it."""
    stored = optimizer._moment(name, optimizer.state[p], p)
    return stored.dequantize() if hasattr(stored, "dequantize") and type(stored) is not Tensor else stored


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name, as bytes."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        values |= {f"{name}.{key}": value for key, value in optimizer.state[p].items()}
    return {name: value.reshape(-1).clone().view(torch.uint8) for name, value in values.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Laws


@settings(max_examples=60)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 80),
    columns=st.integers(1, 700),
    log_scale=st.integers(-6, 4),
    seed=st.integers(0, 99),
)
def test_no_moment_moves_by_more_than_half_a_step_of_its_block(bits, rows, columns, log_scale, seed):
    layer = nn.Linear(columns, rows)
    optimizer = adamw(layer, betas=(0.9, 0.99), moments=bits)
    generator = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        p.grad = torch.randn(p.shape, generator=generator) ** 3 * 10.0**log_scale
    optimizer.step()
    for p in layer.parameters():
        for name, exact in {"exp_avg": 0.1 * p.grad, "exp_avg_sq": 0.01 * p.grad.square()}.items():
            kept = moment(optimizer, p, name)
            codes = optimizer.state[p].get(f"{name}_codes")
            fitting = [n for n in range(SMALLEST_BLOCK, LARGEST_BLOCK + 1) if columns % n == 0]
            odd = bits == "4bit" and columns % 2 == 1
            assert (codes is None) == (p.ndim < 2 or p.numel() < SMALLEST_TENSOR or odd or not fitting)
            if codes is None:
                torch.testing.assert_close(kept, exact, rtol=1e-5, atol=0)
                continue
            block = max((n for n in fitting if n <= BLOCK[bits]), default=fitting[0])
            assert p.numel() // optimizer.state[p][f"{name}_scale"].numel() == block
            largest = exact.view(rows, -1, block).abs().amax(-1, keepdim=True)
            error = (kept - exact).view(rows, -1, block).abs()
            assert (error <= LARGEST_ERROR[bits, name] * largest * 1.001 + 1e-12).all()
            assert not torch.equal(kept, exact)


# Agreement


@pytest.mark.parametrize("bits", BITS)
def test_the_first_update_is_adamws_and_later_ones_stay_near(bits):
    models = [grr_coca_tiny() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, exact = (
        adamw(model, lr=1e-2, decay_all=False, moments=m) for model, m in zip(models, (bits, "fp32"), strict=True)
    )
    start = torch.cat([p.detach().flatten() for p in models[0].parameters()])
    for steps in (range(1), range(1, 20)):
        for model, optimizer in zip(models, (ours, exact), strict=True):
            update(model, optimizer, steps)
        here, there = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
        if steps == range(1):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-7)
    moved, wanted = here - start, there - start
    assert torch.cosine_similarity(moved, wanted, dim=0) > {"8bit": 0.999, "fp8": 0.99, "4bit": 0.9}[bits]
    assert moved.norm() / wanted.norm() == pytest.approx(1, abs={"8bit": 0.01, "fp8": 0.05, "4bit": 0.2}[bits])


@pytest.mark.parametrize("bits", BITS)
def test_a_token_that_is_absent_for_long_moves_as_with_adamw(bits):
    """torchao's own optimizers take steps there up to 50 times as long."""
    moved = []
    for moments in ("fp32", bits):
        torch.manual_seed(0)
        words = nn.Embedding(100, 256)
        optimizer = adamw(words, lr=1.0, weight_decay=0.0, moments=moments)
        for _ in range(50):
            words.weight.grad = 1e-3 * torch.randn(100, 256) * (torch.rand(100, 1) < 0.05)
            before = words.weight.detach().clone()
            optimizer.step()
        moved.append(words.weight.detach() - before)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_where_torchaos_blocks_end_with_the_rows_it_is_torchaos_optimizer(bits):
    kind = {"8bit": optim.AdamW8bit, "4bit": optim.AdamW4bit, "fp8": optim.AdamWFp8}[bits]
    layers = [nn.Linear(512, 24) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, torchaos = adamw(layers[0], moments=bits, **options), kind(layers[1].parameters(), **options)
    update(layers[0], ours, range(5))
    with torch.compiler.set_stance("force_eager"):
        update(layers[1], torchaos, range(5))
    assert "exp_avg_codes" in ours.state[layers[0].weight]
    for p, q in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_compiled_as_on_a_gpu_it_is_the_same_update(bits, monkeypatch):
    layers = [nn.Linear(128, 64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        update(layer, adamw(layer, moments=bits), range(3))
        monkeypatch.setattr(low_bit, "_uncompiled", contextlib.nullcontext)
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


@pytest.mark.slow
def test_a_shard_holds_the_moments_of_its_rows(tmp_path):
    """Three processes, which no width of the model is a multiple of; loaded where one holds all, and trained on."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    done = subprocess.run(
        [*launcher, str(WORKER), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for bits in BITS:
        alone = trained(3, bits=bits)
        model, optimizer = trained(0, bits=bits)
        load_checkpoint(tmp_path / bits / "step_3", model, optimizer)
        assert equal(state_of(model, optimizer), state_of(*alone))
        update(model, optimizer, range(3, 5))
        update(*alone, range(3, 5))
        assert equal(state_of(model, optimizer), state_of(*alone))


# Use


@pytest.mark.parametrize("bits", BITS)
def test_the_moments_of_a_checkpoint_come_back_bit_for_bit_also_amid_a_run(bits, tmp_path):
    """Amid a run, as a soft reset has it: what was learnt since is forgotten."""
    model, optimizer = trained(2, bits=bits)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    saved = state_of(model, optimizer)
    update(model, optimizer, range(2, 4))
    later = state_of(model, optimizer)
    assert not equal(saved, later)
    for it in ((model, optimizer), trained(0, bits=bits)):
        load_checkpoint(path, *it)
        assert equal(state_of(*it), saved)
        update(*it, range(2, 4))
        assert equal(state_of(*it), later)


@pytest.mark.parametrize(("bits", "share"), [("8bit", 0.31), ("fp8", 0.31), ("4bit", 0.24)])
def test_of_the_papers_model_the_state_takes_much_less_memory(bits, share):
    with torch.device("meta"):
        model = grr_coca()
    optimizer = adamw(model, moments=bits)
    taken = sum(x.nbytes for p in model.parameters() for x in optimizer._begin(p).values())
    assert taken < share * sum(2 * p.nbytes for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_a_model_learns_as_with_adamw(bits):
    """Forty steps on eight pairs of noise: what AdamW takes off the loss, moments of few bits do to nine tenths."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(3, 510, (8, 12), generator=generator)
    ends = []
    for moments in ("fp32", bits):
        torch.manual_seed(0)
        model = grr_coca_tiny(vision_layers=1, text_layers=1, multimodal_layers=1)
        optimizer = adamw(model, lr=1e-3, moments=moments)
        losses = []
        for _ in range(40):
            output = model(images, ids)
            contrast = contrastive_loss(output.image_embeddings, output.text_embeddings)
            logits = output.logits[:, :-1].flatten(0, 1)
            loss = contrast + nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        ends.append(losses[0] - losses[-1])
    assert ends[1] > 0.9 * ends[0]


def test_the_checkpoint_of_other_moments_is_refused_by_name(tmp_path):
    model, optimizer = trained(1, bits="8bit")
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    for moments in ("fp32", "4bit", "fp8"):
        with pytest.raises(ValueError, match=r"does not fit the optimizer:[\s\S]*exp_avg.*[\s\S]*optimizer section"):
            load_checkpoint(path, *trained(0, bits=moments))


def test_without_torchao_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"adamw: moments=4bit needs torchao.*pip install \"grr-coca\[quantize\]\""):
        adamw(grr_coca_tiny(), moments="4bit")


def test_the_parts_of_a_moment_have_as_many_rows_as_the_parameter():
    model, optimizer = trained(1, bits="4bit")
    for p in model.parameters():
        for name in MOMENTS:
            if f"{name}_codes" in optimizer.state[p]:
                codes, scale = optimizer.state[p][f"{name}_codes"], optimizer.state[p][f"{name}_scale"]
                assert len(codes) == len(scale) == len(p)
                assert codes.numel() * 2 == p.numel() == math.prod(p.shape)
