"""Block: the pre-norm residual formula, dropout in training only, and replaceable parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from grr.components import (
    GEGLU,
    Block,
    BlockCache,
    CrossAttention,
    KeyValueCache,
    LayerNorm,
    MixedRotaryEmbedding,
    RMSNorm,
    RotaryEmbedding,
    Rotation,
    SelfAttention,
    shared_rotations,
)

D = 8


def a_block(*, context: bool, dropout: float = 0.0, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block(
        attention_norm=RMSNorm(D),
        attention=SelfAttention(D, 2, causal=True, rotary=RotaryEmbedding(D // 2)),
        cross_attention_norm=LayerNorm(D) if context else None,
        cross_attention=CrossAttention(D, 2) if context else None,
        feed_forward_norm=RMSNorm(D),
        feed_forward=GEGLU(D, 12),
        dropout=dropout,
    ).double()


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) * shape[1]), dtype=torch.float64)


@given(b=st.integers(1, 3), s=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_block_without_cross_attention_equals_the_pre_norm_formula(b, s, seed):
    block, x, at = a_block(context=False, seed=seed), random_input(b, s, D), torch.arange(s)
    y = x + block.attention(block.attention_norm(x), positions=at)
    torch.testing.assert_close(block(x, positions=at), y + block.feed_forward(block.feed_forward_norm(y)))


@given(b=st.integers(1, 3), s=st.integers(1, 6), t=st.integers(1, 6), seed=st.integers(0, 99))
def test_cross_attention_comes_between_self_attention_and_feed_forward(b, s, t, seed):
    block, x, context, at = (
        a_block(context=True, seed=seed),
        random_input(b, s, D),
        random_input(b, t, D),
        torch.arange(s),
    )
    y = x + block.attention(block.attention_norm(x), positions=at)
    z = y + block.cross_attention(block.cross_attention_norm(y), context)
    expected = z + block.feed_forward(block.feed_forward_norm(z))
    torch.testing.assert_close(block(x, positions=at, context=context), expected)


@given(b=st.integers(1, 3), s=st.integers(1, 6), t=st.integers(1, 6))
def test_a_block_may_have_cross_attention_only(b, s, t):
    whole, x, context = a_block(context=True), random_input(b, s, D), random_input(b, t, D)
    block = Block(
        cross_attention_norm=whole.cross_attention_norm,
        cross_attention=whole.cross_attention,
        feed_forward_norm=whole.feed_forward_norm,
        feed_forward=whole.feed_forward,
    )
    y = x + whole.cross_attention(whole.cross_attention_norm(x), context)
    cache = BlockCache(tokens=KeyValueCache(0), context=KeyValueCache(t))
    expected = y + whole.feed_forward(whole.feed_forward_norm(y))
    torch.testing.assert_close(block(x, context=context, cache=cache), expected)


def test_a_mask_is_passed_to_the_attention():
    block, x, at = a_block(context=False), random_input(2, 3, D), torch.arange(3)
    mask = torch.tensor([True, False, True])
    y = x + block.attention(block.attention_norm(x), positions=at, mask=mask)
    expected = y + block.feed_forward(block.feed_forward_norm(y))
    torch.testing.assert_close(block(x, positions=at, mask=mask), expected)
    assert (expected != block(x, positions=at)).any()


@given(s=st.integers(2, 6), data=st.data())
def test_no_token_of_a_causal_block_depends_on_a_later_one(s, data):
    block, x, place = a_block(context=True), random_input(2, s, D), data.draw(st.integers(1, s - 1))
    changed = x.clone()
    changed[:, place:] += 1
    before, after = (block(t, positions=torch.arange(s), context=random_input(2, 3, D)) for t in (x, changed))
    torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-12, rtol=0)
    assert (after[:, place:] != before[:, place:]).any()


@given(pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_a_block_that_reads_pieces_with_a_cache_has_the_same_outputs(pieces):
    s = sum(pieces)
    block, x, context, at = a_block(context=True), random_input(2, s, D), random_input(2, 5, D), torch.arange(s)
    cache = BlockCache(tokens=KeyValueCache(s), context=KeyValueCache(5))
    read = [
        block(part, positions=place, context=context, cache=cache)
        for part, place in zip(x.split(pieces, dim=1), at.split(pieces), strict=True)
    ]
    torch.testing.assert_close(torch.cat(read, dim=1), block(x, positions=at, context=context))


@pytest.mark.parametrize("context", [False, True])
def test_dropout_acts_in_training_only(context):
    block, plain = a_block(context=context, dropout=0.5), a_block(context=context)
    x = random_input(2, 4, D)
    inputs = {"positions": torch.arange(4), "context": random_input(2, 3, D) if context else None}
    assert (block(x, **inputs) != block(x, **inputs)).any()
    torch.testing.assert_close(block.eval()(x, **inputs), plain(x, **inputs), atol=0, rtol=0)


def test_every_branch_is_dropped_and_nothing_else():
    block, x = a_block(context=True, dropout=1.0), random_input(2, 4, D)
    torch.testing.assert_close(block(x, positions=torch.arange(4), context=random_input(2, 3, D)), x, atol=0, rtol=0)


class RunningMean(nn.Module):
    """An attention written by a user: each output is the mean of all tokens up to its own."""

    def forward(self, x: Tensor, *, positions: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1).unsqueeze(-1)


def test_a_block_accepts_other_modules_as_parts():
    block = Block(
        attention_norm=nn.Identity(), attention=RunningMean(), feed_forward_norm=nn.Identity(), feed_forward=nn.Tanh()
    )
    x = torch.tensor([[[1.0], [3.0], [8.0]]])
    y = torch.tensor([[[2.0], [5.0], [12.0]]])  # 1 + 1, 3 + 2, 8 + 4
    torch.testing.assert_close(block(x), y + y.tanh())


@given(b=st.integers(1, 3), s=st.integers(1, 6), shift=st.integers(-9, 9))
def test_a_block_that_receives_the_rotation_of_its_positions_has_the_same_outputs(b, s, shift):
    block, x, at = a_block(context=False), random_input(b, s, D), torch.arange(b * s).view(b, s) + shift
    (rotation,) = shared_rotations([block], at)
    assert isinstance(rotation, Rotation)
    torch.testing.assert_close(block(x, positions=rotation), block(x, positions=at), rtol=0, atol=0)


def test_blocks_of_one_rotary_embedding_compute_its_angles_once(kernels):
    rotary, other = RotaryEmbedding(D // 2), RotaryEmbedding(D // 2)
    mixed, at = MixedRotaryEmbedding(D // 2, 2), torch.arange(3)
    blocks = [a_block(context=False) for _ in range(5)]
    for block, embedding in zip(blocks, (rotary, rotary, other, mixed, None), strict=True):
        block.attention.rotary = embedding
    blocks.append(Block(cross_attention_norm=nn.Identity(), cross_attention=CrossAttention(D, 2), **FEED_FORWARD))
    blocks.append(Block(attention_norm=nn.Identity(), attention=RunningMean(), **FEED_FORWARD))
    first, second, third, *rest = shared_rotations(blocks, at)
    assert first is second
    assert isinstance(first, Rotation)
    assert isinstance(third, Rotation)
    assert third is not first
    assert [x is at for x in rest] == [True] * 4  # learned, none, no self-attention, a user's attention
    assert kernels(lambda: shared_rotations(blocks, at))["cos"] == 2


FEED_FORWARD = {"feed_forward_norm": nn.Identity(), "feed_forward": nn.Tanh()}


@pytest.mark.parametrize("kind", ["attention", "cross_attention"])
@pytest.mark.parametrize("only", ["", "_norm"])
def test_an_attention_without_its_norm_or_a_norm_without_its_attention_is_refused(kind, only):
    parts = {"feed_forward_norm": nn.Identity(), "feed_forward": nn.Tanh(), kind + only: nn.Identity()}
    rule = f"Block: {kind} and {kind}_norm must be passed together, got only {kind}{only}$"
    with pytest.raises(ValueError, match=rule):
        Block(**parts)


def test_a_block_without_any_attention_is_refused():
    with pytest.raises(ValueError, match=r"Block: pass attention, cross_attention, or both, .*; got neither"):
        Block(feed_forward_norm=nn.Identity(), feed_forward=nn.Tanh())


@pytest.mark.parametrize("context", [False, True])
def test_a_block_compiles_as_one_graph_for_any_length(context):
    torch.compiler.reset()
    block = a_block(context=context)
    compiled = torch.compile(block, backend="eager", fullgraph=True)  # fullgraph raises at a graph break
    for s in (5, 6, 7):
        inputs = {"positions": torch.arange(s), "context": random_input(2, 3, D) if context else None}
        torch.testing.assert_close(compiled(random_input(2, s, D), **inputs), block(random_input(2, s, D), **inputs))
