"""Self- and cross-attention: dependence of outputs on inputs, the formula, torch's module, and the cache."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from grr.components import CrossAttention, KeyValueCache, MixedRotaryEmbedding, RotaryEmbedding, SelfAttention, rotate

D = 16
sizes = st.tuples(st.integers(1, 3), st.integers(1, 8), st.sampled_from([1, 2, 4]))  # b, s, h
seeds = st.integers(0, 999)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random(module: nn.Module, seed: int = 0) -> nn.Module:
    """Returns the module in float64, with random biases and norms instead of zeros and ones."""
    for i, parameter in enumerate(module.double().parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + i) / math.sqrt(parameter.shape[-1])
    return module


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(k)) v, equation 1 of Vaswani et al. 2017, with minus infinity at masked scores."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full_like(scores, -math.inf).triu(1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.exp() / scores.exp().sum(-1, keepdim=True) @ v


# Laws


@given(sizes=sizes, data=st.data(), seed=seeds)
def test_a_causal_output_depends_on_its_own_token_and_not_on_later_ones(sizes, data, seed):
    b, s, h = sizes
    module = random(SelfAttention(D, h, causal=True, rotary=RotaryEmbedding(D // h), qk_norm=True), seed)
    x, place = normal(b, s, D, seed=seed), data.draw(st.integers(0, s - 1))
    changed = x.clone()
    changed[:, place:] = normal(b, s - place, D, seed=seed + 1)
    before, after = (module(t, positions=torch.arange(s)) for t in (x, changed))
    torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-12, rtol=0)
    assert (after[:, place] != before[:, place]).any()


@given(sizes=sizes, shift=st.integers(-50, 50), causal=st.booleans(), seed=seeds)
def test_only_differences_of_positions_matter(sizes, shift, causal, seed):
    b, s, h = sizes
    module = random(SelfAttention(D, h, causal=causal, rotary=RotaryEmbedding(D // h)), seed)
    x, at = normal(b, s, D, seed=seed), torch.randint(0, 50, (b, s), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(module(x, positions=at + shift), module(x, positions=at), atol=1e-4, rtol=0)


@given(sizes=sizes, seed=seeds)
def test_tokens_permuted_together_with_their_positions_have_the_same_outputs(sizes, seed):
    b, s, h = sizes
    module = random(SelfAttention(D, h, rotary=RotaryEmbedding(D // h)), seed)
    x, at = normal(b, s, D, seed=seed), torch.arange(s)
    order = torch.randperm(s, generator=torch.Generator().manual_seed(seed))
    expected = module(x, positions=at)[:, order]
    torch.testing.assert_close(module(x[:, order], positions=at[order]), expected)


@given(sizes=sizes, t=st.integers(1, 8), qk_norm=st.booleans(), seed=seeds)
def test_the_order_of_a_context_makes_no_difference(sizes, t, qk_norm, seed):
    b, s, h = sizes
    module = random(CrossAttention(D, h, qk_norm=qk_norm), seed)
    x, context = normal(b, s, D, seed=seed), normal(b, t, D, seed=seed + 1)
    order = torch.randperm(t, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(module(x, context[:, order]), module(x, context))


@given(sizes=sizes, causal=st.booleans(), data=st.data(), seed=seeds)
def test_no_output_depends_on_masked_tokens(sizes, causal, data, seed):
    b, s, h = sizes
    module, x = random(SelfAttention(D, h, causal=causal), seed), normal(b, s, D, seed=seed)
    hidden = data.draw(st.integers(1, s))  # a token from here on is hidden; the first is not
    mask = (torch.arange(s) < hidden).view(1, 1, 1, s)
    changed = x.clone()
    changed[:, hidden:] += 1
    before, after = module(x, mask=mask), module(changed, mask=mask)
    torch.testing.assert_close(after[:, :hidden], before[:, :hidden], atol=1e-12, rtol=0)


@given(pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=seeds)
def test_a_masked_sequence_read_in_pieces_with_a_cache_has_the_same_outputs(pieces, seed):
    s = sum(pieces)
    module, x, cache = random(SelfAttention(D, 2, causal=True), seed), normal(2, s, D, seed=seed), KeyValueCache(s)
    mask = torch.rand(2, 1, s, s, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask |= torch.eye(s, dtype=torch.bool)  # the output of a token whose whole row is masked is undefined
    ends = torch.tensor(pieces).cumsum(0).tolist()
    read = [
        module(part, mask=mask[:, :, end - part.shape[1] : end, :end], cache=cache)
        for part, end in zip(x.split(pieces, dim=1), ends, strict=True)
    ]
    torch.testing.assert_close(torch.cat(read, dim=1), module(x, mask=mask))


def without_gate(module: nn.Module, plain: nn.Module) -> nn.Module:
    """Returns `plain` on the weights of a gated module, with the identity for its output projection."""
    weights = {name: x for name, x in module.state_dict().items() if not name.startswith("gate.")}
    plain.double().load_state_dict(weights | {"out.weight": torch.eye(D).double()})
    return plain


@given(sizes=sizes, seed=seeds)
def test_a_gate_multiplies_what_is_attended_to_before_it_is_projected(sizes, seed):
    """Qiu et al. 2025: sigmoid(x G) times the output of attention, channel by channel; G = 0 halves it."""
    b, s, h = sizes
    x, context, at = normal(b, s, D, seed=seed), normal(b, 5, D, seed=seed + 1), torch.arange(s)
    options = {"causal": True, "rotary": RotaryEmbedding(D // h), "bias": False}
    for module, plain, inputs, more in (
        (SelfAttention(D, h, gated=True, **options), SelfAttention(D, h, **options), (x,), {"positions": at}),
        (CrossAttention(D, h, bias=False, gated=True), CrossAttention(D, h, bias=False), (x, context), {}),
    ):
        read = without_gate(random(module, seed), plain)(*inputs, **more)
        gate = 1 / (1 + torch.exp(-x @ module.gate.weight.T))
        torch.testing.assert_close(module(*inputs, **more), (read * gate) @ module.out.weight.T)
        module.gate.weight.data.zero_()
        torch.testing.assert_close(module(*inputs, **more), read / 2 @ module.out.weight.T)


@given(pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=seeds)
def test_gated_attention_in_pieces_with_a_cache_has_the_same_outputs(pieces, seed):
    s, x = sum(pieces), normal(2, sum(pieces), D, seed=seed)
    rotary, cache = RotaryEmbedding(D // 2), KeyValueCache(s)
    module = random(SelfAttention(D, 2, causal=True, rotary=rotary, bias=False, gated=True), seed)
    cross, projected = random(CrossAttention(D, 2, gated=True), seed), KeyValueCache(4)
    at, context, read, crossed = torch.arange(s), normal(1, 4, D, seed=7), [], []
    for part, positions in zip(x.split(pieces, dim=1), at.split(pieces), strict=True):
        read.append(module(part, positions=positions, cache=cache))
        crossed.append(cross(part, context, cache=projected))  # two rows share one context
    torch.testing.assert_close(torch.cat(read, dim=1), module(x, positions=at))
    torch.testing.assert_close(torch.cat(crossed, dim=1), cross(x, context.expand(2, -1, -1)))


@given(d=st.sampled_from([4, 8, 20]), h=st.sampled_from([1, 2, 4]))
def test_parameter_counts(d, h):
    for module in (SelfAttention, CrossAttention):
        assert sum(p.numel() for p in module(d, h).parameters()) == 4 * (d**2 + d)
        assert sum(p.numel() for p in module(d, h, qk_norm=True).parameters()) == 4 * (d**2 + d) + 2 * d // h
        assert sum(p.numel() for p in module(d, h, bias=False).parameters()) == 4 * d**2
        assert sum(p.numel() for p in module(d, h, gated=True).parameters()) == 5 * (d**2 + d)
        assert sum(p.numel() for p in module(d, h, bias=False, gated=True).parameters()) == 5 * d**2
    assert sum(p.numel() for p in CrossAttention(d, h, context_dim=3).parameters()) == 4 * (d**2 + d) - 2 * d * (d - 3)


# Agreement


@given(sizes=sizes, causal=st.booleans(), masked=st.booleans(), seed=seeds)
def test_self_attention_is_the_formula(sizes, causal, masked, seed):
    b, s, h = sizes
    module, x = random(SelfAttention(D, h, causal=causal), seed), normal(b, s, D, seed=seed)
    mask = torch.rand(b, s, s, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = mask | torch.eye(s, dtype=torch.bool) if masked else None
    q, k, v = (x @ w.T + c for w, c in zip(module.qkv.weight.chunk(3), module.qkv.bias.chunk(3), strict=True))
    heads = zip(*(y.chunk(h, dim=-1) for y in (q, k, v)), strict=True)
    joined = torch.cat([attention(*head, causal=causal, mask=mask) for head in heads], dim=-1)
    given_mask = None if mask is None else mask.unsqueeze(1)  # [b, 1, s, s]
    torch.testing.assert_close(module(x, mask=given_mask), joined @ module.out.weight.T + module.out.bias)


@given(sizes=sizes, t=st.integers(1, 8), seed=seeds)
def test_cross_attention_is_the_formula(sizes, t, seed):
    b, s, h = sizes
    module, x, context = random(CrossAttention(D, h), seed), normal(b, s, D, seed=seed), normal(b, t, D, seed=seed + 1)
    q = x @ module.q.weight.T + module.q.bias
    k, v = (context @ module.kv.weight.T + module.kv.bias).chunk(2, dim=-1)
    heads = zip(*(y.chunk(h, dim=-1) for y in (q, k, v)), strict=True)
    joined = torch.cat([attention(*head) for head in heads], dim=-1)
    torch.testing.assert_close(module(x, context), joined @ module.out.weight.T + module.out.bias)


@given(sizes=sizes, causal=st.booleans(), seed=seeds)
def test_self_attention_agrees_with_torchs_module(sizes, causal, seed):
    b, s, h = sizes
    ours, theirs = random(SelfAttention(D, h, causal=causal), seed), nn.MultiheadAttention(D, h, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj = ours.qkv.weight, ours.qkv.bias, ours.out
    x, hidden = normal(b, s, D, seed=seed), torch.ones(s, s, dtype=torch.bool).triu(1) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(ours(x), expected)


@given(sizes=sizes, t=st.integers(1, 8), seed=seeds)
def test_cross_attention_agrees_with_torchs_module(sizes, t, seed):
    b, s, h = sizes
    ours, theirs = random(CrossAttention(D, h), seed), nn.MultiheadAttention(D, h, batch_first=True).double()
    theirs.in_proj_weight.data = torch.cat((ours.q.weight, ours.kv.weight)).detach()
    theirs.in_proj_bias.data = torch.cat((ours.q.bias, ours.kv.bias)).detach()
    theirs.out_proj = ours.out
    x, context = normal(b, s, D, seed=seed), normal(b, t, D, seed=seed + 1)
    expected, _ = theirs(x, context, context, need_weights=False)
    torch.testing.assert_close(ours(x, context), expected)


@given(sizes=sizes, t=st.integers(2, 8), c=st.integers(1, 12), seed=seeds)
def test_context_norm_is_applied_first_and_may_drop_vectors_of_the_context(sizes, t, c, seed):
    class NormOfTheRest(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, 1:])

    b, s, h = sizes
    ours = random(CrossAttention(D, h, context_dim=c, context_norm=NormOfTheRest(c)), seed)
    theirs = nn.MultiheadAttention(D, h, kdim=c, vdim=c, batch_first=True).double()
    theirs.q_proj_weight = ours.q.weight
    theirs.k_proj_weight.data, theirs.v_proj_weight.data = ours.kv.weight.detach().chunk(2)
    theirs.in_proj_bias.data = torch.cat((ours.q.bias, ours.kv.bias)).detach()
    theirs.out_proj = ours.out
    x, context, cache = normal(b, s, D, seed=seed), normal(b, t, c, seed=seed + 1), KeyValueCache(t)
    rest = ours.context_norm(context)
    assert rest.shape == (b, t - 1, c)
    expected, _ = theirs(x, rest, rest, need_weights=False)
    for _ in range(2):  # the second time from the cache
        torch.testing.assert_close(ours(x, context, cache=cache), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [RotaryEmbedding, lambda head_dim: MixedRotaryEmbedding(head_dim, 2)])
def test_queries_and_keys_are_normalised_before_they_are_rotated(kind, causal):
    module = random(SelfAttention(D, 2, causal=causal, rotary=kind(D // 2), qk_norm=True))
    x, at = normal(2, 5, D, seed=9), torch.arange(5)
    at = at if module.rotary.axes == 1 else torch.stack((at, -at), dim=-1)
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in module.qkv(x).chunk(3, dim=-1))
    q = rotate(nn.functional.rms_norm(q, (8,), module.q_norm.weight, 1e-6), module.rotary.angles(at))
    k = rotate(nn.functional.rms_norm(k, (8,), module.k_norm.weight, 1e-6), module.rotary.angles(at))
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(module(x, positions=at), module.out(y.transpose(1, 2).flatten(2)))


def test_queries_and_keys_of_cross_attention_are_normalised():
    module, x, context = random(CrossAttention(D, 2, qk_norm=True)), normal(2, 3, D, seed=8), normal(2, 5, D, seed=9)
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (module.q(x), *module.kv(context).chunk(2, dim=-1)))
    q = nn.functional.rms_norm(q, (8,), module.q_norm.weight, 1e-6)
    k = nn.functional.rms_norm(k, (8,), module.k_norm.weight, 1e-6)
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(module(x, context), module.out(y.transpose(1, 2).flatten(2)))


# The cache


@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5), spare=st.integers(0, 3), seed=seeds)
def test_a_sequence_read_in_pieces_with_a_cache_has_the_same_outputs(pieces, spare, seed):
    module = random(SelfAttention(D, 2, causal=True, rotary=RotaryEmbedding(D // 2), qk_norm=True), seed)
    s = sum(pieces)
    x, at, cache = normal(2, s, D, seed=seed), torch.arange(s), KeyValueCache(s + spare)
    read = [
        module(part, positions=place, cache=cache)
        for part, place in zip(x.split(pieces, dim=1), at.split(pieces), strict=True)
    ]
    torch.testing.assert_close(torch.cat(read, dim=1), module(x, positions=at))
    assert cache.length == s


@given(s=st.integers(3, 6), first=st.integers(1, 2), spare=st.integers(0, 3), seed=seeds)
def test_a_cache_of_fixed_shapes_has_the_same_outputs_whatever_its_memory_held(s, first, spare, seed):
    module = random(SelfAttention(D, 2, causal=True, rotary=RotaryEmbedding(D // 2)), seed)
    x, at, cache = normal(2, s, D, seed=seed), torch.arange(s), KeyValueCache(s + spare)
    read = [module(x[:, :first], positions=at[:first], cache=cache)]
    for memory in (cache.keys, cache.values):
        memory[:, :, first:] = torch.nan
    place, mask = torch.tensor([first]), torch.full((1, 1, 1, s + spare), -torch.inf, dtype=x.dtype)
    mask[..., :first] = 0
    cache.fix(place, mask)
    for token in x[:, first:].split(1, dim=1):
        mask.index_fill_(-1, place, 0)
        read.append(module(token, positions=place, cache=cache))
        place += 1
    torch.testing.assert_close(torch.cat(read, dim=1), module(x, positions=at))
    assert cache.filled()[0].shape[2] == s + spare


def test_a_context_is_projected_at_the_first_call_only():
    module, cache = random(CrossAttention(D, 2, qk_norm=True)), KeyValueCache(6)
    x, context, projected = normal(2, 4, D, seed=0), normal(2, 6, D, seed=1), []
    module.kv.register_forward_hook(lambda *_: projected.append(True))
    read = [module(token, context, cache=cache) for token in x.split(1, dim=1)]
    assert projected == [True]
    torch.testing.assert_close(torch.cat(read, dim=1), module(x, context))


@given(pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4), too_many=st.integers(1, 3))
def test_a_cache_returns_what_was_appended_and_refuses_more_than_max_length(pieces, too_many):
    s = sum(pieces)
    keys, values, cache = normal(2, 3, s, 4, seed=0), normal(2, 3, s, 4, seed=1), KeyValueCache(s)
    for k, v in zip(keys.split(pieces, dim=2), values.split(pieces, dim=2), strict=True):
        cache.append(k, v)
    more = torch.zeros(2, 3, too_many, 4)
    with pytest.raises(ValueError, match=rf"KeyValueCache: {s} \+ {too_many} tokens do not fit into max_length={s}"):
        cache.append(more, more)
    stored_keys, stored_values = cache.filled()  # the refused call changed nothing
    assert stored_keys.equal(keys)
    assert stored_values.equal(values)


@given(pieces=st.lists(st.integers(1, 3), min_size=2, max_size=4), data=st.data(), seed=seeds)
def test_selecting_rows_of_a_cache_equals_selecting_the_sequences_first(pieces, data, seed):
    b, s = 3, sum(pieces)
    x, at, cache = normal(b, s, D, seed=seed), torch.arange(s), KeyValueCache(s)
    module = random(SelfAttention(D, 2, causal=True, rotary=RotaryEmbedding(D // 2)), seed)
    cache.select(torch.tensor([0]))  # an empty cache fits any rows
    order, read = torch.arange(b), 0
    for piece in pieces:
        part = slice(read, read + piece)
        got = module(x[order, part], positions=at[part], cache=cache)
        torch.testing.assert_close(got, module(x[order], positions=at)[:, part])
        rows = torch.tensor(data.draw(st.lists(st.integers(0, len(order) - 1), min_size=1, max_size=5)))
        cache.select(rows)
        order, read = order[rows], read + piece


@given(sizes=sizes, n=st.integers(1, 3), t=st.integers(1, 4), seed=seeds)
def test_rows_that_share_a_context_have_the_outputs_of_rows_with_a_copy_each(sizes, n, t, seed):
    b, s, h = sizes
    module, context = random(CrossAttention(D, h, qk_norm=True), seed), normal(b, t, D, seed=seed + 1)
    x, cache = normal(b * n, s, D, seed=seed), KeyValueCache(t)
    expected = module(x, context.repeat_interleave(n, dim=0))
    torch.testing.assert_close(module(x, context, cache=cache), expected)
    torch.testing.assert_close(module(x, context, cache=cache), expected)
    assert len(cache.keys) == b


# Errors


def test_a_rotary_embedding_without_positions_is_refused():
    module = SelfAttention(D, 2, rotary=RotaryEmbedding(D // 2))
    with pytest.raises(ValueError, match="SelfAttention: a rotary embedding needs positions, got positions=None"):
        module(torch.ones(1, 3, D))


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_a_width_that_is_not_a_multiple_of_num_heads_is_refused(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: dim must be a multiple of num_heads, got dim=8, .*=3"):
        kind(8, 3)
