"""The choice of what is trained: parts in full, by adapters, or not at all."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grr.components import Block, LoRALinear, adapter_parameters
from grr.models.builders import create_model, grr_coca, grr_coca_tiny
from grr.models.tuning import PROJECTIONS, add_adapters, check_adapter_dropout, linear_layers, tune_parts

TOWERS = ("vision_encoder", "text_decoder", "multimodal_decoder")
PARTS = (*TOWERS, "generative_pooler", "contrastive_pooler")


def tiny(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "multimodal_layers": 2}
    return grr_coca_tiny(vocab_size=32, image_size=16, patch_size=8, **{**sizes, **changes})


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.randint(3, 30, (3, 9), generator=generator)


def train_randomly(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_b, std=0.1)


@given(
    lora=st.lists(st.sampled_from(PARTS), min_size=1, unique=True),
    projections=st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True),
    rank=st.integers(1, 4),
)
@settings(max_examples=30)
def test_a_model_with_adapters_begins_as_the_model_bit_for_bit_and_gradients_reach_them_alone(lora, projections, rank):
    model = tiny()
    adapted = copy.deepcopy(model)
    frozen = tuple(part for part in PARTS if part not in lora)
    linears = {f"{p}.{name}": x for p in lora for name, x in linear_layers(model.get_submodule(p)).items()}
    chosen = {name: x for name, x in linears.items() if name.rpartition(".")[2] in projections}
    if any(not any(name.startswith(f"{part}.") for name in chosen) for part in lora):
        with pytest.raises(ValueError, match="add_adapters: projections must name linear layers of "):
            tune_parts(adapted, frozen=frozen, lora=tuple(lora), rank=rank, projections=tuple(projections))
        return
    tune_parts(adapted, frozen=frozen, lora=tuple(lora), rank=rank, projections=tuple(projections))

    ours, theirs = adapted(*inputs()), model(*inputs())
    for name in ("image_embeddings", "text_embeddings", "logits"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name

    adapters = adapter_parameters(adapted)
    assert {name.rpartition(".")[0] for name in adapters} == chosen.keys()
    assert sum(p.numel() for p in adapters.values()) == sum(rank * sum(x.weight.shape) for x in chosen.values())
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == sum(p.numel() for p in adapters.values())

    train_randomly(adapted)
    ours = adapted(*inputs())
    (ours.image_embeddings.sum() + ours.text_embeddings.sum() + ours.logits.square().sum()).backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == adapters.keys()


@pytest.mark.parametrize("name", ["grr_coca_tiny", "open_clip_coca_vit_b_32"])
def test_every_matrix_of_the_blocks_has_an_adapter_by_default(name):
    with torch.device("meta"):
        model = create_model(name)
        tune_parts(model, lora=TOWERS, rank=4)
    left = [n for block in model.modules() if isinstance(block, Block) for n in linear_layers(block)]
    assert left == []
    assert isinstance(model.multimodal_decoder.head, nn.Linear)  # whose matrix is read without calling it
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad and "lora" not in n} <= {
        "generative_pooler",
        "contrastive_pooler",
        "text_projection",
        "logit_scale",
    }


def test_the_papers_model_has_the_adapters_that_the_formula_counts():
    """Rank 8 on 12 blocks a tower: 8 (in + out) a matrix, at widths 768, 2,073 (encoder) and 3,072 (decoders)."""
    with torch.device("meta"):
        model = grr_coca()
        tune_parts(model, lora=TOWERS, rank=8)
    d = 768
    attention = (d + 3 * d) + (d + d)
    cross = (d + d) + (d + 2 * d) + (d + d)
    networks = {f: (d + 2 * f) + (f + d) for f in (2073, 3072)}
    expected = 12 * 8 * (3 * attention + cross + networks[2073] + 2 * networks[3072])
    assert sum(p.numel() for p in adapter_parameters(model).values()) == expected == 4_652_064


def test_the_parts_that_are_not_named_are_trained_in_full():
    model = tiny()
    tune_parts(model, frozen=("vision_encoder",), lora=("text_decoder",), rank=2, projections=("up", "qkv"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    full = ("generative_pooler.", "contrastive_pooler.", "multimodal_decoder.")
    assert {name for name in trained if "lora_" not in name} == {
        name for name, _ in model.named_parameters() if name.startswith(full)
    }
    assert {name for name in trained if "lora_" in name} == {
        f"text_decoder.blocks.0.{layer}.lora_{x}" for layer in ("attention.qkv", "feed_forward.up") for x in "ab"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora": ("text_decoder", "text_decoder")},
            r"tune_parts: each part must be named once, got text_decoder, text",
        ),
        ({"lora": ("vision",)}, r"tune_parts: the model does not have the part vision; its parts are vision_encoder"),
        (
            {"lora": TOWERS, "frozen": ("text_decoder", "vision_encoder")},
            r"either frozen or has adapters, got text_decoder, vision_encoder in both lists; remove it",
        ),
        (
            {"lora": TOWERS, "projections": ("qkv", "head")},
            r"projections must name linear layers, got head; those of vision_encoder, .* are down, kv, out, q, qkv, u",
        ),
        (
            {"lora": ("vision_encoder",), "projections": ("qkv", "nope")},
            r"projections must name linear layers, got nope; those of vision_encoder are down, out, qkv, up$",
        ),
        (
            {"lora": ("vision_encoder",), "projections": ("kv",)},
            r"must name linear layers of VisionTransformer, got kv; it has down, out, qkv, up",
        ),
        ({"lora": TOWERS, "rank": 17}, r"LoRALinear: rank must be from 1 to the shorter side .*, got rank=17 for 48 x"),
    ],
)
def test_choices_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tune_parts(tiny(), **options)


def test_dropout_of_adapters_needs_a_size_of_micro_batches():
    check_adapter_dropout(TOWERS, 0.1, 8)
    check_adapter_dropout(TOWERS, 0.0, None)
    check_adapter_dropout((), 0.1, None)
    with pytest.raises(ValueError, match=r"got dropout=0.1 with run.micro_batch_size=null; set run.micro_batch_size"):
        check_adapter_dropout(TOWERS, 0.1, None)


def test_adapters_train_on_a_quantised_model():
    pytest.importorskip("torchao.quantization", reason='pip install "grr-coca[quantize]"')
    from grr.inference.quantization import quantize

    model = tiny(dim=32)
    quantize(model, "int8_weight_only")
    exact = model(*inputs()).logits
    for part in TOWERS:
        add_adapters(model.get_submodule(part), rank=2)
    assert torch.equal(model(*inputs()).logits, exact)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        images, ids = inputs()
        loss = torch.nn.functional.cross_entropy(model(images, ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == adapter_parameters(model).keys()
    assert losses[-1] < losses[0]
