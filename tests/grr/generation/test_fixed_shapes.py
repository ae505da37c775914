"""Decoding with fixed shapes, as off the CPU: the same captions, no wait for the device, one program for all tokens."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grr.components import Block, SelfAttention
from grr.generation.decoding_state import CHECK_EVERY, DecodingState
from grr.generation.generate import search
from grr.models.builders import grr_coca, grr_coca_tiny
from grr.models.open_clip import open_clip_coca
from grr.parallel.process_group import process_group
from grr.parallel.shard import shard_over, unsharded
from grr.training.random_batches import NumberTokenizer

VOCAB, CONTEXT = 60, 24
ROOM = CONTEXT - 3
TOKENIZER: Any = NumberTokenizer(VOCAB, CONTEXT)
SEARCHES = [{}, {"num_beams": 3}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}]
RULES = {"min_new_tokens": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
VIEWS = ("view", "_unsafe_view", "as_strided", "expand", "permute", "transpose", "t", "slice", "select", "split")
VIEWS += (
    "alias",
    "split_with_sizes",
    "squeeze",
    "unsqueeze",
    "unbind",
    "unfold",
    "detach",
    "empty",
    "empty_like",
    "new_empty",
)


def a_model(seed: int = 0, *, build=grr_coca_tiny, **options):
    """Returns a float64 model whose logits are large, depend on the image, and favour EOS: captions of all lengths."""
    torch.manual_seed(seed)
    model = build(vocab_size=VOCAB, context_length=CONTEXT, **options).double().eval()
    with torch.no_grad():
        for block in (*model.text_decoder.blocks, *model.multimodal_decoder.blocks):
            if block.attention is not None:
                block.attention.qkv.weight *= 4
                block.attention.out.weight *= 4
            if block.cross_attention is not None:
                block.cross_attention.out.weight *= 4
        model.multimodal_decoder.head.weight *= 8
        if model.multimodal_decoder.head.bias is not None:
            model.multimodal_decoder.head.bias[TOKENIZER.eos_id] += 4
    return model


def some_images(count: int, seed: int = 0, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_state(model, images: Tensor, *, fixed_shapes: bool | None = True, **rules) -> DecodingState:
    rules = {"max_new_tokens": ROOM} | rules
    return DecodingState(model, images, TOKENIZER, fixed_shapes=fixed_shapes, **rules)


@torch.no_grad()
def captions(model, images: Tensor, rules: dict, options: dict, *, fixed_shapes: bool) -> list[list[int]]:
    return search(a_state(model, images, fixed_shapes=fixed_shapes, **rules), **options).tolist()


class Operations(TorchDispatchMode):
    """Log of what a GPU would compute: name and shapes of each operation but views; RMSNorm and attention are one each.

    Copies of tensors from the host to another device are logged as "copy from the host".
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple] = []
        self.functions = _Fused(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        result = function(*args, **(kwargs or {}))
        if self.functions.depth == 0 and name not in VIEWS:
            given_tensors = [x for x in args if isinstance(x, Tensor)]
            if isinstance(result, Tensor) and any(x.device != result.device for x in given_tensors if x.ndim):
                name = "copy from the host"
            self.log.append((name, *(tuple(x.shape) for x in given_tensors)))
        return result

    def __enter__(self):
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.functions.__exit__(*error)


class _Fused(TorchFunctionMode):
    """Makes one operation of a function that is one kernel on a GPU and several operations elsewhere."""

    def __init__(self, operations: Operations) -> None:
        self.operations, self.depth = operations, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (F.rms_norm, F.scaled_dot_product_attention):
            return function(*args, **(kwargs or {}))
        self.depth += 1
        try:
            result = function(*args, **(kwargs or {}))
        finally:
            self.depth -= 1
        if self.depth == 0:
            self.operations.log.append((function.__name__, *(tuple(x.shape) for x in args if isinstance(x, Tensor))))
        return result


# Equal captions

rules = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, ROOM),
        "min_new_tokens": st.integers(0, 1),
        "no_repeat_ngram_size": st.integers(0, 3),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.5]),
    }
)
beams = st.fixed_dictionaries({"num_beams": st.integers(1, 4), "length_penalty": st.sampled_from([0.0, 1.0])})


@given(count=st.integers(1, 7), rules=rules, options=beams, seed=st.integers(0, 99))
def test_fixed_shapes_have_the_captions_of_growing_caches_and_shrinking_batches(count, rules, options, seed):
    model, images = a_model(seed), some_images(count, seed)
    expected = captions(model, images, rules, options, fixed_shapes=False)
    assert captions(model, images, rules, options, fixed_shapes=True) == expected


def test_the_captions_that_are_compared_differ_in_words_and_length():
    written = [
        row for seed in range(5) for (row,) in captions(a_model(seed), some_images(5, seed), {}, {}, fixed_shapes=True)
    ]
    assert len(set(map(tuple, written))) >= 8
    assert len({row.count(0) for row in written}) >= 4


@given(rules=rules, options=st.sampled_from(SEARCHES[2:]), seed=st.integers(0, 99))
def test_samples_of_one_image_are_the_same(rules, options, seed):
    """In a larger batch they are not, since the draws of a row depend on how many rows there are."""
    model, images, options = a_model(seed), some_images(1, seed), options | {"seed": seed}
    expected = captions(model, images, rules, options, fixed_shapes=False)
    assert captions(model, images, rules, options, fixed_shapes=True) == expected


OPEN_CLIP = {"vision_layers": 1, "text_layers": 2, "multimodal_layers": 2, "image_size": 32}


@pytest.mark.parametrize("options", SEARCHES[:2])
@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (grr_coca_tiny, {"text_position": "learned", "qk_norm": True}),
        (grr_coca_tiny, {"text_position": "sinusoidal", "text_norm": "layernorm", "text_feed_forward": "mlp"}),
        (open_clip_coca, OPEN_CLIP),
        (open_clip_coca, OPEN_CLIP | {"cascade_pooler": True, "text_arch": "modern"}),
    ],
)
def test_so_have_models_of_other_parts(build, arguments, options):
    model, images = a_model(1, build=build, **arguments), some_images(4, 1)
    expected = captions(model, images, RULES, options, fixed_shapes=False)
    assert captions(model, images, RULES, options, fixed_shapes=True) == expected


@pytest.mark.parametrize("options", SEARCHES[:2])
def test_so_has_a_sharded_model(options):
    model, images = a_model(), some_images(5)
    expected = captions(model, images, {}, options, fixed_shapes=False)
    with process_group():
        shard_over(model, init_device_mesh("cpu", (1,)))
        assert captions(model, images, {}, options, fixed_shapes=True) == expected
        with unsharded(model):
            assert captions(model, images, {}, options, fixed_shapes=True) == expected


def test_so_has_a_quantised_model():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: the extra quantize")
    model, images = a_model().float(), some_images(5).float()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for options in SEARCHES[:2]:
        expected = captions(model, images, {}, options, fixed_shapes=False)
        assert captions(model, images, {}, options, fixed_shapes=True) == expected


# No waits, few operations: on the meta device tensors have no values, so reading one is an error


def a_state_on_meta(batch: int = 1, build=grr_coca, **rules) -> DecodingState:
    """Returns a state of the paper's model in bfloat16."""
    with torch.device("meta"):
        model = build().bfloat16().eval()
        images = torch.empty(batch, 3, 288, 288, dtype=torch.uint8)
    tokenizer: Any = NumberTokenizer(model.multimodal_decoder.head.out_features, 64)
    return DecodingState(model, images, tokenizer, **({"max_new_tokens": 30} | rules))


@pytest.mark.parametrize("rules", [{}, RULES])
@pytest.mark.parametrize("options", SEARCHES)
def test_nothing_is_read_from_the_device_but_at_every_eighth_token_and_at_the_last(options, rules):
    for max_new_tokens, first_read in ((20, CHECK_EVERY), (5, 5)):
        state = a_state_on_meta(2, grr_coca_tiny, max_new_tokens=max_new_tokens, **rules)
        wait = pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor")
        with torch.no_grad(), Operations() as operations, wait:
            search(state, **options)
        assert state.length == first_read
        assert "copy from the host" not in {name for name, *_ in operations.log}


@torch.no_grad()
def operations_of_tokens(state: DecodingState, num_beams: int, tokens: int) -> list[list[tuple]]:
    """Returns the log of each token of greedy search, or of rows in a new order for num_beams > 1."""
    logs = []
    for _ in range(tokens):
        with Operations() as operations:
            ids = state.log_probabilities().argmax(-1)
            if num_beams > 1:
                rows = torch.arange(num_beams, device=ids.device).flip(0)
                state.select(rows % len(ids))
                ids = ids[rows % len(ids)]
            state.extend(ids)
        logs.append(operations.log)
    return logs


@pytest.mark.parametrize("num_beams", [1, 6])
def test_all_tokens_but_two_take_the_same_operations_on_tensors_of_the_same_shapes(num_beams):
    """The first fills the caches of the image, and the second fixes their shapes."""
    first, _, third, *others = operations_of_tokens(a_state_on_meta(**RULES), num_beams, 6)
    assert first != third
    assert all(other == third for other in others)


def test_a_token_of_the_papers_model_takes_at_most_500_operations():
    for num_beams, most in ((1, 500), (6, 510)):
        log = operations_of_tokens(a_state_on_meta(), num_beams, 3)[-1]
        assert 400 < len(log) <= most, Counter(name for name, *_ in log).most_common()


# One program


@pytest.mark.parametrize("options", SEARCHES[:2])
@pytest.mark.parametrize("rules", [{}, RULES])
def test_a_step_is_compiled_whole_and_once_for_all_tokens(options, rules):
    model, images, graphs = a_model(), some_images(4), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = captions(model, images, rules, options, fixed_shapes=True)
    state = a_state(model, images, **rules)
    compiled = torch.compile(state.compute, fullgraph=True, dynamic=False, backend=backend)
    plain = state.compute
    state.compute = lambda: compiled() if state.length > 1 else plain()  # the first token fills the caches of the image
    with torch.no_grad():
        assert search(state, **options).tolist() == expected
    assert state.length > 4
    assert len(graphs) == 1


@pytest.mark.slow
def test_the_kernels_of_the_compiler_write_the_same_captions():
    model, images = a_model(), some_images(4)
    expected = captions(model, images, RULES, {"num_beams": 3}, fixed_shapes=True)
    state = a_state(model, images, **RULES)
    compiled, plain = torch.compile(state.compute, fullgraph=True), state.compute
    state.compute = lambda: compiled() if state.length > 1 else plain()
    with torch.no_grad():
        assert search(state, num_beams=3).tolist() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", SEARCHES[:2])
def test_a_captured_step_writes_the_captions_of_the_cpu(options):
    model, images = a_model(), some_images(5)
    expected = captions(model, images, RULES, options, fixed_shapes=False)
    with torch.no_grad():
        state = a_state(model.cuda(), images.cuda(), fixed_shapes=None, **RULES)
        assert search(state, **options).tolist() == expected
    assert state._replay is not None


# Memory


@pytest.mark.parametrize("num_beams", [2, 5])
def test_the_memory_of_the_caches_keeps_its_address(num_beams):
    state = a_state(a_model(), some_images(2))
    addresses = set()
    with torch.no_grad():
        for _ in range(6):
            state.log_probabilities()
            if state.length > 1:
                caches = [cache.tokens for cache in (*state.caches[0], *state.caches[1])]
                addresses.add((state.ids.data_ptr(), *(x.data_ptr() for c in caches for x in (c.keys, c.values))))
            rows = torch.randint(0, len(state.ids), (2 * num_beams,)).sort().values
            state.select(rows)
            state.extend(rows)
    assert len(addresses) == 1


# Errors


@pytest.mark.parametrize("options", SEARCHES)
def test_nan_is_reported_at_the_next_check(options):
    model, images = a_model(), some_images(3)
    images[1] = math.nan
    state = a_state(model, images)
    error = "generate: the scores of the next token must be numbers, got NaN"
    with torch.no_grad(), pytest.raises(ValueError, match=error):
        search(state, **options)
    assert state.length == CHECK_EVERY


def test_attention_that_does_not_read_masks_of_caches_keeps_growing_caches():
    class Other(SelfAttention):
        def forward(self, x, **kwargs):
            return super().forward(x, **kwargs)

    assert a_state_on_meta(build=grr_coca_tiny).fixed_shapes

    def build():
        model = grr_coca_tiny()
        block = next(module for module in model.text_decoder.modules() if isinstance(module, Block))
        block.attention = Other(64, 2, causal=True, rotary=block.attention.rotary)
        return model

    assert not a_state_on_meta(build=build).fixed_shapes
