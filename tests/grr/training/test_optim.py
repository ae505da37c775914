"""The optimizer's parameter groups, and what is frozen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.models.builders import grr_coca_tiny
from grr.models.tuning import freeze
from grr.training.optim import adamw
from grr.training.schedule import set_lr


def test_all_parameters_decay_by_default_and_only_matrices_without_decay_all():
    model = grr_coca_tiny()
    (everything,) = adamw(model).param_groups
    assert len(everything["params"]) == len(list(model.parameters()))
    assert everything["weight_decay"] == 1e-3
    assert everything["betas"] == (0.9, 0.999)
    matrices, rest = adamw(model, decay_all=False).param_groups
    assert all(p.dim() > 1 for p in matrices["params"])
    assert rest["weight_decay"] == 0.0
    assert len(matrices["params"]) + len(rest["params"]) == len(everything["params"])


def scales(model: torch.nn.Module, **arguments) -> dict[str, float]:
    """Of every parameter by name."""
    names = {p: name for name, p in model.named_parameters()}
    groups = adamw(model, **arguments).param_groups
    return {names[p]: group["scale"] for group in groups for p in group["params"]}


@given(decay=st.floats(0.1, 1.0), layers=st.integers(1, 4), decay_all=st.booleans(), lr=st.floats(1e-6, 1.0))
def test_layer_decay_multiplies_the_rate_once_per_layer_from_the_top(decay, layers, decay_all, lr):
    model = grr_coca_tiny(vision_layers=layers, vision_position="learned", text_layers=2, multimodal_layers=1)
    found = scales(model, layer_decay=decay, decay_all=decay_all)
    assert found.keys() == dict(model.named_parameters()).keys()
    tops = {"vision_encoder": layers, "text_decoder": 2, "multimodal_decoder": 1}
    for name, scale in found.items():
        tower, part, *rest = name.split(".")
        if part == "blocks":
            expected = decay ** (tops[tower] - int(rest[0]))
        elif part in ("patches", "embedding", "positions"):
            expected = decay ** (tops[tower] + 1)
        else:  # poolers, the final norm, the head
            expected = 1.0
        assert scale == pytest.approx(expected)
    made_with, given = adamw(model, lr=lr, layer_decay=decay), adamw(model, lr=0.5, layer_decay=decay)
    set_lr(given, lr)
    for optimizer in (made_with, given):
        assert all(group["lr"] == lr * group["scale"] for group in optimizer.param_groups)


def test_a_tower_outside_a_model_decays_as_inside():
    model = grr_coca_tiny()
    whole = scales(model, layer_decay=0.5)
    for name in ("vision_encoder", "text_decoder", "multimodal_decoder"):
        alone = scales(model.get_submodule(name), layer_decay=0.5)
        assert alone == {key.removeprefix(f"{name}."): value for key, value in whole.items() if key.startswith(name)}


def test_a_tied_embedding_has_the_rate_of_an_embedding():
    assert scales(grr_coca_tiny(tied_embeddings=True), layer_decay=0.5)["text_decoder.embedding.weight"] == 0.5**3


def test_a_step_moves_each_layer_by_its_rate():
    """Adam's first step is the learning rate times the sign of the gradient."""
    model = grr_coca_tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, weight_decay=0.0, eps=0.0, layer_decay=0.5)
    set_lr(optimizer, 0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {name: (before[name] - p.detach()).mean().item() for name, p in model.named_parameters()}
    assert moved["multimodal_decoder.head.bias"] == pytest.approx(0.01, rel=1e-3)
    assert moved["vision_encoder.blocks.1.attention.qkv.bias"] == pytest.approx(0.005, rel=1e-3)
    assert moved["vision_encoder.patches.projection.bias"] == pytest.approx(0.00125, rel=1e-3)


def test_frozen_parameters_are_not_optimized():
    model = grr_coca_tiny()
    freeze(model, frozen=("vision_encoder", "generative_pooler"))
    trained = scales(model)
    assert {name.split(".")[0] for name in trained} == {"contrastive_pooler", "text_decoder", "multimodal_decoder"}
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())


def test_freeze_names_unknown_parts_and_a_model_without_trainable_parameters():
    with pytest.raises(
        ValueError, match=r"freeze: the model does not have the part vision, tex; its parts are vision_encoder, .*"
    ):
        freeze(grr_coca_tiny(), frozen=("vision", "text_decoder", "tex"))
    parts = ["vision_encoder", "generative_pooler", "contrastive_pooler", "text_decoder", "multimodal_decoder"]
    with pytest.raises(
        ValueError, match=r"freeze: no parameter remains to be trained when vision_encoder, .*; remove one"
    ):
        freeze(grr_coca_tiny(), frozen=parts)


@pytest.mark.parametrize("layer_decay", [0.0, 1.5, float("nan")])
def test_a_layer_decay_out_of_range_is_refused(layer_decay):
    with pytest.raises(ValueError, match=f"adamw: layer_decay must be above 0 and at most 1, got {layer_decay=}"):
        adamw(grr_coca_tiny(), layer_decay=layer_decay)


@pytest.mark.parametrize(
    "arguments",
    [{"lr": float("nan")}, {"lr": float("inf")}, {"lr": 0.0}, {"weight_decay": -1e-3}, {"eps": -1e-8}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=rf"adamw: lr must be above 0, .*eps at least 0.*{name}={value}"):
        adamw(grr_coca_tiny(), **arguments)
