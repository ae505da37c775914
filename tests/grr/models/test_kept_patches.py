"""Patch dropout in the vision encoder: the kept patches are encoded as if the others had never been in the image."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grr.components import (
    Block,
    ClassToken,
    FeedForward,
    LearnedPositions,
    PatchDropout,
    PatchEmbedding,
    RMSNorm,
    RotaryEmbedding,
    SelfAttention,
    fold_in,
)
from grr.inference.pretrained import describe
from grr.models.builders import MODELS, grr_coca_tiny, vision_transformer
from grr.models.coca import VisionTransformer

POSITIONS = ["rope", "rope_2d", "rope_mixed", "sinusoidal", "learned"]
KEYS = fold_in(7, torch.arange(3))


def encoder(p: float, position: str = "rope", *, dropout: float = 0.0) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 24, "patch_size": 4, "dim": 32, "num_heads": 2, "num_layers": 2}
    return vision_transformer(position=position, patch_dropout=p, dropout=dropout, **sizes).double()


def with_class_token(p: float) -> VisionTransformer:
    torch.manual_seed(0)
    block = Block(
        attention_norm=RMSNorm(32),
        attention=SelfAttention(32, 2, rotary=RotaryEmbedding(16)),
        feed_forward_norm=RMSNorm(32),
        feed_forward=FeedForward(32, 64),
    )
    return VisionTransformer(
        patches=PatchEmbedding(32, 4),
        blocks=[block],
        positions=LearnedPositions(32, 37),
        class_token=ClassToken(32),
        patch_dropout=p,
    ).double()


class MaskedAttention(nn.Module):
    """An attention that reads only the tokens of a mask [b, s], for comparison."""

    def __init__(self, attention: nn.Module, visible: torch.Tensor) -> None:
        super().__init__()
        self.attention, self.visible = attention, visible

    def forward(self, x, **inputs):
        return self.attention(x, mask=self.visible[:, None, None], **inputs)


def masked(model: VisionTransformer, kept: torch.Tensor, num_tokens: int) -> VisionTransformer:
    """The model on all patches, in which no token attends to a patch that is not kept."""
    visible = torch.zeros(len(kept), num_tokens, dtype=torch.bool).scatter(1, kept, True)
    for block in model.blocks:
        block.attention = MaskedAttention(block.attention, visible)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("position", [*POSITIONS, "class token"])
def test_kept_patches_are_encoded_as_by_full_attention_that_is_masked_to_them(position, dropout):
    def build(p: float) -> VisionTransformer:
        return with_class_token(p) if position == "class token" else encoder(p, position, dropout=dropout)

    images, num_tokens = torch.randn(3, 3, 24, 24).double(), 37 if position == "class token" else 36
    x = torch.arange(num_tokens).expand(3, -1).unsqueeze(-1)  # [b, p, 1]
    kept = build(0.5).patch_dropout(x, torch.arange(num_tokens), keys=KEYS)[1]  # [b, k]
    ours = build(0.5)(images, sample_keys=KEYS)  # [b, k, d]
    whole = masked(build(0.0), kept, num_tokens)(images, sample_keys=KEYS)  # [b, p, d]
    assert ours.shape == (3, 18 + num_tokens - 36, 32)
    torch.testing.assert_close(ours, whole.gather(1, kept.unsqueeze(-1).expand(-1, -1, 32)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", POSITIONS)
def test_without_patch_dropout_and_in_evaluation_nothing_changes(position):
    images = torch.randn(3, 3, 24, 24).double()
    whole, dropped = encoder(0.0, position), encoder(0.5, position)
    assert [*whole.state_dict()] == [*dropped.state_dict()]
    assert torch.equal(whole.eval()(images), dropped.eval()(images))
    assert torch.equal(whole.train()(images, sample_keys=KEYS), whole.eval()(images))
    assert not torch.equal(dropped.train()(images, sample_keys=KEYS)[0], whole(images)[0, :18])


def test_shapes_are_static_so_that_the_encoder_compiles_whole():
    torch._dynamo.reset()
    model, images = encoder(0.5, "rope_2d", dropout=0.1), torch.randn(3, 3, 24, 24).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, sample_keys=KEYS), model(images, sample_keys=KEYS))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_patch_dropout_and_drops_nothing_by_default(name):
    assert inspect.signature(MODELS[name]).parameters["patch_dropout"].default == 0.0
    with torch.device("meta"):
        assert MODELS[name](patch_dropout=0.25).vision_encoder.patch_dropout.p == 0.25


def test_gradients_reach_the_weights_through_the_kept_patches_only():
    model = encoder(0.5)
    images = torch.randn(1, 3, 24, 24).double().requires_grad_()
    model(images, sample_keys=KEYS[:1]).square().sum().backward()
    seen = F.max_pool2d(images.grad.abs().sum(1), 4).flatten() > 0  # [p]
    kept = model.patch_dropout(torch.zeros(1, 36, 1), torch.arange(36), keys=KEYS[:1])[1]
    assert torch.equal(seen.nonzero().flatten(), kept[0])


def test_a_trained_model_is_described_without_the_patch_dropout_of_its_training():
    assert describe("grr_coca_tiny", {"dim": 64, "patch_dropout": 0.5}, "squash")["arguments"] == {"dim": 64}


def test_a_captioner_trains_on_the_kept_patches():
    model = grr_coca_tiny(patch_dropout=0.5)
    kept = []
    model.generative_pooler.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0].shape[1]))
    images, ids = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([[510, 7, 1, 511]] * 2)
    model(images, ids, sample_keys=KEYS[:2])
    model.eval()(images, ids)
    assert kept == [8, 16]
    assert [m.p for m in model.modules() if isinstance(m, PatchDropout)] == [0.5]
