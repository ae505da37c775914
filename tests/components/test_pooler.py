"""The poolers: invariance to order and repetition, torch's attention, and parameter counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from grr.components import AttentionPooler, CrossAttention, CrossAttentionPooler, LayerNorm

sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.sampled_from([1, 2, 4]))  # b, t, n, h
seeds = st.integers(0, 999)


def pooler_and_input(b: int, t: int, n: int, h: int, seed: int) -> tuple[AttentionPooler, Tensor]:
    torch.manual_seed(seed)
    return AttentionPooler(8, n, h).double(), torch.randn(b, t, 8, dtype=torch.float64)


@given(sizes=sizes, seed=seeds)
def test_the_order_of_the_input_makes_no_difference(sizes, seed):
    pooler, x = pooler_and_input(*sizes, seed)
    torch.testing.assert_close(pooler(x[:, torch.randperm(x.shape[1])]), pooler(x))


@given(sizes=sizes, times=st.integers(2, 4), seed=seeds)
def test_repeating_the_input_does_not_change_the_output(sizes, times, seed):
    pooler, x = pooler_and_input(*sizes, seed)
    torch.testing.assert_close(pooler(x.repeat(1, times, 1)), pooler(x))


@given(sizes=sizes, seed=seeds)
def test_it_equals_torchs_attention_with_an_identity_query_projection(sizes, seed):
    pooler, x = pooler_and_input(*sizes, seed)
    theirs = nn.MultiheadAttention(8, sizes[-1], batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((torch.eye(8), pooler.kv.weight)))
        theirs.in_proj_bias.copy_(torch.cat((torch.zeros(8), pooler.kv.bias)))
    theirs.out_proj.load_state_dict(pooler.out.state_dict())
    expected, _ = theirs(pooler.queries.expand(len(x), -1, -1), x, x, need_weights=False)
    torch.testing.assert_close(pooler(x), expected)


def test_the_poolers_of_the_paper_have_its_parameter_counts():
    """SPEC: generative pooler 1,820,928 (64 queries), contrastive pooler 1,772,544 (one)."""
    with torch.device("meta"):
        for queries, expected in ((64, 1_820_928), (1, 1_772_544)):
            assert sum(p.numel() for p in AttentionPooler(768, queries, 12).parameters()) == expected
            assert expected == queries * 768 + 3 * (768**2 + 768)


def test_queries_begin_with_unit_variance():
    torch.manual_seed(0)
    assert AttentionPooler(64, 64, 4).queries.std().item() == pytest.approx(1.0, abs=0.05)


def test_a_width_that_is_not_a_multiple_of_num_heads_is_refused():
    with pytest.raises(ValueError, match=r"AttentionPooler: dim must be a multiple of num_heads, got dim=8, .*=3"):
        AttentionPooler(8, 1, 3)


@given(sizes=sizes, c=st.integers(2, 12), seed=seeds)
def test_the_cross_attention_pooler_equals_torchs_attention_on_normalised_inputs(sizes, c, seed):
    b, t, n, h = sizes
    torch.manual_seed(seed)
    attention = CrossAttention(8, h, context_dim=c, context_norm=LayerNorm(c))
    pooler = CrossAttentionPooler(8, n, norm=LayerNorm(8), attention=attention).double()
    x = torch.randn(b, t, c).double()
    theirs = nn.MultiheadAttention(8, h, kdim=c, vdim=c, batch_first=True).double()
    with torch.no_grad():
        if c == 8:  # torch then keeps the three matrices as one
            theirs.in_proj_weight.copy_(torch.cat((attention.q.weight, attention.kv.weight)))
        else:
            theirs.q_proj_weight.copy_(attention.q.weight)
            theirs.k_proj_weight.copy_(attention.kv.weight[:8])
            theirs.v_proj_weight.copy_(attention.kv.weight[8:])
        theirs.in_proj_bias.copy_(torch.cat((attention.q.bias, attention.kv.bias)))
    theirs.out_proj.load_state_dict(attention.out.state_dict())
    queries, context = nn.functional.layer_norm(pooler.queries, (8,)), nn.functional.layer_norm(x, (c,))
    expected, _ = theirs(queries.expand(b, -1, -1), context, context, need_weights=False)
    torch.testing.assert_close(pooler(x), expected)
    assert pooler(x).shape == (b, n, 8)


def test_an_input_of_another_width_is_refused_by_the_pooler():
    with pytest.raises(ValueError, match=r"AttentionPooler: x must be \[b, t, 8\], got \[2, 5, 12\]; build the"):
        AttentionPooler(8, 1, 2)(torch.zeros(2, 5, 12))
