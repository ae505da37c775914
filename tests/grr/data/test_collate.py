"""Batches of captions: moving padding is invertible, labels equal plain Python's, and attention needs no mask."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_rows import label_rows
from torch import nn

from grr.components import RotaryEmbedding, SelfAttention, rotate
from grr.data.collate import IGNORE, collate_captions, right_pad, undo_right_pad

PAD, EOS, BOS, CLS = 0, 1, 32_100, 32_101
captions = st.lists(st.lists(st.integers(2, 32_099), max_size=61), min_size=1, max_size=5)


def layout(tokens: list[int]) -> list[int]:
    """Returns SPEC's row of 65 ids: BOS t1 ... tn EOS PAD ... PAD CLS PAD."""
    return [BOS, *tokens, EOS, *[PAD] * (61 - len(tokens)), CLS, PAD]


@given(b=st.integers(1, 4), s=st.integers(1, 12), pad_id=st.sampled_from([0, 3]), seed=st.integers(0, 999))
def test_right_pad_moves_padding_to_the_end_and_undo_right_pad_moves_it_back(b, s, pad_id, seed):
    ids = torch.randint(0, 5, (b, s), generator=torch.Generator().manual_seed(seed))
    padded, positions = right_pad(ids, pad_id=pad_id)
    for row, padded_row, columns in zip(ids.tolist(), padded.tolist(), positions.tolist(), strict=True):
        tokens = [i for i in row if i != pad_id]
        assert padded_row == tokens + [pad_id] * (s - len(tokens))
        assert [row[column] for column in columns] == padded_row
        assert sorted(columns) == list(range(s))
    x = torch.stack((padded, padded * 7), dim=-1)  # [b, s, 2]
    assert undo_right_pad(x, positions).equal(torch.stack((ids, ids * 7), dim=-1))


@given(captions=captions)
def test_each_label_is_the_next_token_of_the_caption(captions):
    """Compare with plain Python: pairs (input, next id) of the row, without those whose input is PAD."""
    batch = collate_captions([layout(c) for c in captions])
    assert batch.num_labels == sum(len(caption) + 1 for caption in captions)  # one for BOS and each token
    for caption, row in zip(captions, label_rows(batch).tolist(), strict=True):
        whole = layout(caption)
        pairs = [pair for pair in pairwise(whole) if pair[0] != PAD]
        expected = [IGNORE if following in (BOS, PAD, CLS) else following for _, following in pairs]
        assert expected[-2:] == [IGNORE, IGNORE]  # after EOS and CLS
        assert expected[:-2] == [*caption, EOS]
        assert row == expected[:-2] + [IGNORE] * (len(row) - len(caption) - 1)


@given(captions=captions, multiple=st.sampled_from((1, 4, 8)))
def test_the_sizes_of_a_batch_are_rounded_up_so_that_there_are_few_of_them(captions, multiple):
    batch = collate_captions([layout(c) for c in captions], text_multiple=multiple)
    (b, t), n = batch.ids.shape, len(batch.labels)
    longest, tokens = max(map(len, captions)) + 3, sum(len(caption) + 1 for caption in captions)
    assert (b, t) == (len(captions), multiple * math.ceil(longest / multiple)) == batch.positions.shape
    assert n == 64 * math.ceil(tokens / 64) == len(batch.label_places)
    assert (batch.labels[tokens:] == IGNORE).all()
    assert (batch.labels[:tokens] != IGNORE).all()
    assert 0 <= batch.label_places.min() <= batch.label_places.max() < b * t


def test_a_batch_is_never_longer_than_the_context():
    assert collate_captions([[BOS, 7, EOS, CLS, PAD]], text_multiple=8).ids.shape == (1, 4)


@given(captions=captions, data=st.data())
def test_a_row_without_labels_is_as_if_its_tokens_had_none(captions, data):
    labelled = data.draw(st.lists(st.booleans(), min_size=len(captions), max_size=len(captions)))
    rows = [layout(c) for c in captions]
    batch, whole = collate_captions(rows, labelled=labelled), collate_captions(rows)
    expected = label_rows(whole)
    expected[~torch.tensor(labelled)] = IGNORE
    assert label_rows(batch).equal(expected)
    assert batch.ids.equal(whole.ids)


@given(captions=captions)
def test_cls_follows_eos_at_position_63(captions):
    ids, positions, cls_places, *_ = collate_captions([layout(c) for c in captions])
    assert ids.gather(1, cls_places.unsqueeze(1)).eq(CLS).all()
    for caption, row, columns in zip(captions, ids.tolist(), positions.tolist(), strict=True):
        n = len(caption)
        assert row == [BOS, *caption, EOS, CLS] + [PAD] * (len(row) - n - 3)
        assert columns[: n + 3] == [*range(n + 2), 63]


def test_the_only_label_of_an_empty_caption_is_eos():
    batch = collate_captions([layout([])], text_multiple=4)
    assert batch.ids.tolist() == [[BOS, EOS, CLS, PAD]]
    assert batch.positions[:, :3].tolist() == [[0, 1, 63]]
    assert batch.labels[: batch.num_labels].tolist() == [EOS]


def test_bos_and_cls_are_never_labels():
    batch = collate_captions([layout([7, BOS, 8, CLS, 9])])
    assert label_rows(batch).tolist() == [[7, IGNORE, 8, IGNORE, 9, EOS, IGNORE, IGNORE]]


@pytest.fixture(scope="module")
def table() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(32_102, 8).double()


@given(captions=captions)
def test_causal_attention_over_right_padded_rows_equals_masked_attention_over_the_layout(table, captions):
    """The explicit mask hides later tokens from every token and PAD from all tokens but PAD."""
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, causal=True, rotary=RotaryEmbedding(4)).double()
    rows = torch.tensor([layout(c) for c in captions])[:, :-1]  # [b, 64]
    visible = (rows != PAD).unsqueeze(1) & torch.ones(64, 64, dtype=torch.bool).tril()  # [b, s, t]
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in attention.qkv(table(rows)).chunk(3, dim=-1))
    angles = attention.rotary.angles(torch.arange(64))
    y = nn.functional.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, visible.unsqueeze(1))
    expected = attention.out(y.transpose(1, 2).flatten(2))  # [b, 64, 8]

    ids, positions, *_ = collate_captions([layout(c) for c in captions])
    real = ids != PAD
    y = attention(table(ids), positions=positions)
    torch.testing.assert_close(y[real], expected.gather(1, positions.unsqueeze(-1).expand_as(y))[real])


@given(captions=captions)
def test_no_token_depends_on_padding_and_only_cls_on_cls(table, captions):
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, causal=True, rotary=RotaryEmbedding(4)).double()
    ids, positions, *_ = collate_captions([layout(c) for c in captions])
    x = table(ids)
    before = attention(x, positions=positions)
    for changed, unchanged in ((ids == PAD, ids != PAD), (ids == CLS, (ids != PAD) & (ids != CLS))):
        other = torch.where(changed.unsqueeze(-1), x + 1, x)
        after = attention(other, positions=positions)
        torch.testing.assert_close(after[unchanged], before[unchanged], atol=1e-12, rtol=0)


def test_a_batch_without_captions_is_refused():
    with pytest.raises(ValueError, match="collate_captions: rows must have at least one caption, got none; leave out"):
        collate_captions([])
