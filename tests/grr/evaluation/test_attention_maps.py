"""Attention maps against torch's own attention, in every kind of model and however the model was prepared."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from evaluate_worker import a_model, a_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grr.components import AttentionPooler, CrossAttention
from grr.data.collate import collate_captions
from grr.evaluation.attention import attention_weights, word_attention
from grr.evaluation.examples import words_of_tokens
from grr.models.builders import grr_coca_tiny
from grr.models.open_clip import open_clip_coca
from grr.parallel.parallelize import parallelize
from grr.parallel.shard import blocks, unsharded

CAPTIONS = ["a red fox number 3", "a white star"]
CPU = torch.device("cpu")


def a_batch(tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids, positions, *_ = collate_captions([tokenizer.encode(c) for c in CAPTIONS], pad_id=tokenizer.pad_id)
    return pixels, ids, positions


def torch_weights(queries: Tensor, context: Tensor, q: Tensor, k: Tensor, bias: Tensor, heads: int) -> Tensor:
    """The weights of torch's own multi-head attention with these projections, the mean over its heads: [b, s, t]."""
    d = queries.shape[-1]
    return F.multi_head_attention_forward(
        queries.transpose(0, 1),
        *[context.transpose(0, 1)] * 2,
        *(d, heads, None, bias, None, None, False, 0.0, torch.eye(d), torch.zeros(d)),
        use_separate_proj_weight=True,
        q_proj_weight=q,
        k_proj_weight=k,
        v_proj_weight=k,
    )[1]


@given(heads=st.sampled_from([1, 2, 4]), b=st.integers(1, 3), t=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_weights_are_those_of_torchs_multi_head_attention_and_sum_to_1(heads, b, t, seed):
    torch.manual_seed(seed)
    pooler, cross = AttentionPooler(16, 5, heads), CrossAttention(16, heads, context_dim=12)
    x, tokens, context = torch.randn(b, t, 16), torch.randn(b, 4, 16), torch.randn(b, t, 12)
    found = attention_weights(pooler, x), attention_weights(cross, tokens, context)
    bias = torch.cat([torch.zeros(16), pooler.kv.bias])
    expected = (
        torch_weights(pooler.queries.expand(b, -1, -1), x, torch.eye(16), pooler.kv.weight[:16], bias, heads),
        torch_weights(
            tokens, context, cross.q.weight, cross.kv.weight[:16], torch.cat([cross.q.bias, cross.kv.bias]), heads
        ),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.sum(-1), torch.ones(ours.shape[:2]))


class Kernels(TorchFunctionMode):
    """Keeps the softmax of every attention that a model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k = args[:2]
            self.weights.append(torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1).mean(1))
        return function(*args, **(kwargs or {}))


def test_a_map_is_the_attention_of_the_decoder_times_that_of_the_pooler(tokenizer):
    torch.manual_seed(0)
    model = grr_coca_tiny(vocab_size=tokenizer.vocab_size, num_queries=5, multimodal_layers=3)
    pixels, ids, positions = a_batch(tokenizer)
    with torch.no_grad(), Kernels() as kernels:
        model.eval()(pixels, ids, positions=positions)
    s, p = ids.shape[1], 4 * 6
    [pooler] = [w for w in kernels.weights if w.shape[1:] == (5, p)]
    layers = [w for w in kernels.weights if w.shape[1:] == (s, 5)]
    assert len(layers) == 3
    expected = (sum(layers) / 3) @ pooler  # [b, s, p]
    maps = word_attention(model, pixels, ids, positions=positions)
    torch.testing.assert_close(maps, expected.view(2, s, 4, 6))
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, s))


def test_maps_leave_the_model_as_it_was(tokenizer):
    model = a_model(tokenizer).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    word_attention(model, *a_batch(tokenizer)[:2], positions=a_batch(tokenizer)[2])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True}])
def test_maps_of_a_prepared_model_are_those_of_the_plain_one(tokenizer, process_group, options):
    pixels, ids, positions = a_batch(tokenizer)
    plain = word_attention(a_model(tokenizer), pixels, ids, positions=positions)
    model = a_model(tokenizer)
    parallelize(model, CPU, **options)
    with unsharded(model):
        maps = word_attention(model, pixels, ids, positions=positions)
    torch.testing.assert_close(maps, plain, atol=1e-2 if "bf16" in options else 1e-6, rtol=0)


def test_maps_of_compiled_blocks_are_those_of_the_plain_ones(tokenizer):
    pixels, ids, positions = a_batch(tokenizer)
    model = a_model(tokenizer).eval()
    plain = word_attention(model, pixels, ids, positions=positions)
    for block in blocks(model):
        block.compile(backend="eager")  # compiled code that never calls a hook, without the wait for a compiler
    with torch.no_grad():
        model(pixels, ids, positions=positions)
    torch.testing.assert_close(word_attention(model, pixels, ids, positions=positions), plain)


@pytest.mark.parametrize("kind", [{}, {"cascade_pooler": True}, {"cascade_pooler": True, "text_arch": "modern"}])
def test_maps_of_open_clips_models_leave_out_the_class_token_and_what_captions_do_not_read(tokenizer, kind):
    sizes = {"vision_dim": 32, "vision_heads": 2, "vision_layers": 1, "pooler_heads": 2, "dim": 32, "num_heads": 2}
    sizes |= {"text_layers": 1, "multimodal_layers": 1, "num_queries": 7, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = open_clip_coca(vocab_size=tokenizer.vocab_size, context_length=16, **sizes, **kind)
    pixels, ids, positions = a_batch(tokenizer)
    maps = word_attention(model, pixels[..., :32], ids, positions=positions)
    assert maps.shape == (2, ids.shape[1], 4, 4)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(maps.shape[:2]))


def test_an_encoder_of_another_kind_has_no_maps(tokenizer):
    model = a_model(tokenizer)
    model.vision_encoder = nn.Sequential(nn.Conv2d(3, 64, 8, 8), nn.Flatten(2), nn.Linear(24, 24))
    pixels, ids, positions = a_batch(tokenizer)
    assert word_attention(model, pixels, ids, positions=positions) is None


@given(words=st.lists(st.sampled_from(["a", "red", "fox", "number", "3", "boxes", "moonstar"]), min_size=1, max_size=8))
def test_every_token_belongs_to_the_word_that_it_spells(words):
    with TemporaryDirectory() as folder:
        tokenizer = a_tokenizer(Path(folder))
    ids = tokenizer.encode(" ".join(words))
    tokens = ids[1 : ids.index(tokenizer.eos_id)]
    found, word_of = words_of_tokens(tokenizer, ids)
    assert found == tokenizer.decode(tokens).split()
    assert len(word_of) == len(tokens)
    for number, word in enumerate(found):
        assert tokenizer.decode([t for t, w in zip(tokens, word_of, strict=True) if w == number]).strip() == word
