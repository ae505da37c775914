"""The formula is what torch's own counter counts on the model that is built, tower by tower."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_rows import label_rows
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grr.evaluation.flops import (
    Towers,
    batch_flops,
    decoding_bytes,
    forward_flops,
    parameters,
    step_flops,
    training_flops,
)
from grr.models.builders import MODELS, baseline_coca, grr_coca, grr_coca_tiny
from grr.models.open_clip import open_clip_coca
from grr.training.counters import flop_counter
from grr.training.random_batches import random_batches
from grr.training.step import global_batch_step


def counted(model: nn.Module, image_size: int, text_length: int, *, backward: bool = False) -> tuple[Towers, int]:
    """What FlopCounterMode says of one sample on the meta device, by tower, and in all."""
    images = torch.zeros(1, 3, image_size, image_size, device="meta")
    ids = torch.zeros(1, text_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        output = model(images, ids)
        if backward:
            (output.logits.sum() + output.image_embeddings.sum() + output.text_embeddings.sum()).backward()
    counts = {name.removeprefix("CoCa."): sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    towers = Towers(
        vision=counts["vision_encoder"],
        poolers=counts["generative_pooler"] + counts["contrastive_pooler"],
        text=counts["text_decoder"],
        multimodal=counts["multimodal_decoder"],
        head=counts["multimodal_decoder.head"],  # called by CoCa itself, so no part of the line above
    )
    return towers, counter.get_total_flops()


def built(builder, **arguments) -> nn.Module:
    with torch.device("meta"):
        return builder(**arguments)


def argument(builder, name: str) -> int:
    return inspect.signature(builder).parameters[name].default


small = st.fixed_dictionaries(
    {
        "vision_norm": st.sampled_from(["rmsnorm", "layernorm"]),
        "vision_feed_forward": st.sampled_from(["geglu", "swiglu", "mlp"]),
        "vision_position": st.sampled_from(["rope", "rope_2d", "rope_mixed", "sinusoidal", "learned"]),
        "text_norm": st.sampled_from(["rmsnorm", "layernorm"]),
        "text_feed_forward": st.sampled_from(["geglu", "swiglu", "mlp"]),
        "text_position": st.sampled_from(["rope", "sinusoidal"]),
        "vocab_size": st.integers(5, 99),
        "context_length": st.integers(4, 12),
        "vision_layers": st.integers(1, 2),
        "text_layers": st.integers(1, 2),
        "multimodal_layers": st.integers(1, 2),
        "vision_ffn_multiplier": st.none() | st.floats(0.5, 5),
        "text_ffn_multiplier": st.floats(0.5, 5),
        "patch_dropout": st.sampled_from([0.0, 0.3, 0.5]),
        "qk_norm": st.booleans(),
        "pooler_norm": st.booleans(),
        "tied_embeddings": st.booleans(),
        "learned_temperature": st.booleans(),
    }
)


@settings(max_examples=15)
@given(
    arguments=small,
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    patch_size=st.integers(1, 5),
    side=st.integers(1, 4),
    text_length=st.integers(1, 14),
)
def test_the_formula_equals_torchs_count_for_any_options(arguments, num_heads, head_dim, patch_size, side, text_length):
    image_size = side * patch_size
    arguments |= {
        "dim": num_heads * head_dim,
        "num_heads": num_heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    model = built(grr_coca, **arguments)
    towers, total = counted(model, image_size, text_length)
    assert forward_flops(grr_coca, text_length=text_length, training=True, **arguments) == towers
    assert towers.total == total
    assert (
        forward_flops(grr_coca, text_length=text_length, **arguments)
        == counted(model.eval(), image_size, text_length)[0]
    )
    assert parameters(model).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_equals_torchs_count_at_every_preset(name):
    builder = MODELS[name]
    towers, total = counted(built(builder), argument(builder, "image_size"), argument(builder, "context_length"))
    assert forward_flops(builder) == towers
    assert towers.total == total


def test_training_costs_three_forward_passes_less_the_gradient_of_pixels():
    image_size = argument(grr_coca_tiny, "image_size")
    _, total = counted(built(grr_coca_tiny), image_size, 16, backward=True)
    assert training_flops(grr_coca_tiny) == total
    pixels = 2 * image_size**2 * 3 * argument(grr_coca_tiny, "dim")
    assert training_flops(grr_coca_tiny) == 3 * forward_flops(grr_coca_tiny).total - pixels


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [None, 4])
def test_a_step_executes_what_the_model_needs_with_scores_of_attention_again_filling_labels_and_similarities(
    tokens, patch_dropout
):
    sizes = {"vocab_size": 512, "context_length": 16, "image_size": 32}
    model = grr_coca_tiny(**sizes, patch_dropout=patch_dropout)
    batches = random_batches(1, batch_size=8, caption_tokens=tokens, **sizes)
    needed = step_flops(grr_coca_tiny, batches, **sizes, patch_dropout=patch_dropout)
    head = 2 * argument(grr_coca_tiny, "dim") * sizes["vocab_size"]  # of a label
    more = 3 * head * sum(len(batch.labels) - batch.num_labels for batch in batches)
    assert more > 0
    more += (
        3 * 2 * 2 * 8 * 8 * argument(grr_coca_tiny, "dim")
    )  # similarities of images to texts, and of texts to images
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as flops:
        global_batch_step(model, batches, 0)
    assert flops.get_total_flops() == needed + more
    with flop_counter() as flops:
        global_batch_step(model, batches, 0)
    assert 1 <= flops.get_total_flops() / (needed + more) < 1.02


def test_the_geglu_of_the_paper_costs_what_its_mlp_costs_but_for_a_rounded_width():
    grr, baseline = forward_flops(MODELS["grr_coca"]), forward_flops(MODELS["baseline_coca"])
    assert grr[1:] == baseline[1:]
    assert grr.vision == pytest.approx(baseline.vision, rel=0.02)


def test_the_parameters_of_each_tower_are_those_of_the_specification():
    """SPEC: ViT, poolers, unimodal decoder, multimodal decoder with norm and head, to the last parameter."""
    towers = parameters(built(grr_coca))
    assert towers.total == 394_548_926
    assert (towers.vision, towers.poolers, towers.text) == (86_487_384, 1_820_928 + 1_772_544, 138_038_784)
    assert towers.multimodal + towers.head == 166_429_286


def test_an_argument_that_the_builder_does_not_take_is_named():
    with pytest.raises(TypeError, match=r"grr_coca takes no argument 'dimm' \(did you mean dim\?\); help"):
        forward_flops(grr_coca, dimm=64)


def test_a_builder_that_is_not_a_preset_of_coca_is_refused_by_name():
    with pytest.raises(ValueError, match="FLOPs are known for the presets of coca only, got open_clip_coca; count"):
        forward_flops(open_clip_coca)


def test_a_text_length_of_0_is_refused():
    with pytest.raises(ValueError, match=r"text_length must be at least 1, got text_length=0"):
        forward_flops(grr_coca, text_length=0)


@pytest.mark.parametrize("tokens", [None, 1, 5])
@pytest.mark.parametrize("builder", [grr_coca_tiny, baseline_coca])
def test_the_cost_of_batches_is_torchs_count(builder, tokens):
    sizes = {"vocab_size": 60, "context_length": 16, "image_size": 16}
    layers = {"patch_size": 8, "dim": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 2, "multimodal_layers": 1}
    model = builder(**sizes, **layers)
    batches = random_batches(2, batch_size=3, caption_tokens=tokens, **sizes)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            model(batch.images, batch.ids, positions=batch.positions, labels=label_rows(batch))
    assert batch_flops(builder, batches, **sizes, **layers).total == counter.get_total_flops()


def test_a_token_needs_both_decoders_but_neither_embeddings_nor_projections_of_the_image():
    with torch.device("meta"):
        model = grr_coca_tiny()
    d, v, layers = 64, 512, 2
    block = 4 * (d * d + d) + 3 * d * 4 * d + 2 * 4 * d + d + 2 * d  # attention, GEGLU, two norms
    cross = 2 * (d * d + d) + d  # queries and output, a norm
    assert decoding_bytes(model) == 4 * (layers * (2 * block + cross) + d + d * v + v)
    assert decoding_bytes(model.bfloat16()) * 2 == decoding_bytes(grr_coca_tiny())
