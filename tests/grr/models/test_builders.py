"""The models have the paper's parameters, to the last one, and the same function however they are built."""

import inspect
import itertools
import math
import pydoc

import pytest
import torch
from torch import Tensor, nn

from grr.components import AttentionPooler, Block, LayerNorm, RMSNorm
from grr.models.builders import (
    MODELS,
    baseline_coca,
    baseline_vit,
    check_builder,
    coca,
    create_model,
    grr_coca,
    grr_coca_2b,
    grr_coca_tiny,
    grr_vit,
    list_models,
    original_coca,
    original_coca_2b,
    preset,
    text_decoder,
    vision_transformer,
)
from grr.models.coca import CoCa, TextDecoder, VisionTransformer
from grr.models.open_clip import OPEN_CLIP_MODELS, open_clip_coca

D, V = 768, 32_102
ATTENTION = 4 * (D * D + D)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def on_meta(builder, **arguments) -> nn.Module:
    with torch.device("meta"):
        return builder(**arguments)


def test_both_models_have_the_published_number_of_parameters():
    grr, baseline = parameters(on_meta(grr_coca)), parameters(on_meta(baseline_coca))
    assert (grr, baseline) == (394_548_926, 393_863_270)
    assert round(100 * (grr / baseline - 1), 2) == 0.17


def test_each_tower_has_the_parameters_that_its_formula_gives():
    def geglu(hidden: int) -> int:
        return 2 * (D * hidden + hidden) + hidden * D + D

    def pooler(queries: int) -> int:
        return queries * D + 3 * (D * D + D)

    patches = 3 * 18 * 18 * D + D
    model = on_meta(grr_coca)
    assert parameters(model.vision_encoder) == patches + 12 * (ATTENTION + geglu(int(2.7 * D)) + 2 * D)
    assert parameters(model.generative_pooler) == pooler(64)
    assert parameters(model.contrastive_pooler) == pooler(1)
    assert parameters(model.text_decoder) == V * D + 12 * (ATTENTION + geglu(4 * D) + 2 * D)
    multimodal = 12 * (2 * ATTENTION + geglu(4 * D) + 3 * D) + D + (D * V + V)
    assert parameters(model.multimodal_decoder) == multimodal
    mlp = 2 * 4 * D * D + 4 * D + D
    assert parameters(on_meta(baseline_coca).vision_encoder) == patches + 12 * (ATTENTION + mlp + 4 * D)


def test_towers_alone_are_the_towers_of_the_models():
    assert parameters(on_meta(grr_vit)) == parameters(on_meta(grr_coca).vision_encoder) == 86_487_384
    assert parameters(on_meta(baseline_vit)) == parameters(on_meta(baseline_coca).vision_encoder) == 85_801_728
    assert parameters(on_meta(text_decoder)) == parameters(on_meta(grr_coca).text_decoder) == 138_038_784


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("feed_forward", ["geglu", "swiglu", "mlp"])
@pytest.mark.parametrize("position", ["rope", "rope_2d", "rope_mixed", "sinusoidal", "learned"])
def test_every_change_to_the_vit_is_a_switch_of_its_own(norm, feed_forward, position):
    vit = on_meta(vision_transformer, norm=norm, feed_forward=feed_forward, position=position)
    biases = 24 * D if norm == "layernorm" else 0  # a LayerNorm has D more than an RMSNorm; 2 in each of 12 blocks
    hidden = (3 * D + 2) * int(2.7 * D) + D if feed_forward != "mlp" else (2 * D + 1) * 4 * D + D
    learned = {"learned": 256 * D, "rope_mixed": 12 * 12 * 64}.get(position, 0)
    patches = 3 * 18 * 18 * D + D
    assert parameters(vit) == patches + 12 * (ATTENTION + hidden + 2 * D) + biases + learned
    assert any(isinstance(m, RMSNorm if norm == "rmsnorm" else LayerNorm) for m in vit.modules())


def test_the_published_counts_exclude_the_multiplier_of_table_1_in_the_text_decoders():
    assert parameters(on_meta(grr_coca, text_ffn_multiplier=2.7)) == 339_260_270  # SPEC: the other reading


def test_the_original_coca_has_nothing_of_an_llm_in_it():
    kinds = {type(m).__name__ for m in on_meta(original_coca).modules()}
    assert kinds.isdisjoint({"RMSNorm", "GEGLU", "RotaryEmbedding"})


def test_the_largest_model_has_two_billion_parameters():
    assert 2.0e9 < parameters(on_meta(grr_coca_2b)) < 2.3e9


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_shows_its_arguments_and_says_what_it_is(name):
    builder = MODELS[name]
    assert builder.__doc__
    assert builder.__name__ == name
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(builder).parameters.values())


@pytest.mark.parametrize("builder", [grr_coca_tiny, preset(grr_coca_tiny, "mine", "Trains on a laptop CPU.")])
def test_help_shows_what_a_preset_takes_and_its_own_defaults_an_argument_a_line(builder):
    lines = pydoc.plain(pydoc.render_doc(builder)).splitlines()
    assert lines[0] == f"Python Library Documentation: function {builder.__name__} in module grr.models.builders"
    first = lines.index(f"{builder.__name__}(")
    last = lines.index(") -> grr.models.coca.CoCa")
    arguments = [line.strip(" ,").partition(":")[0] for line in lines[first + 1 : last]]
    assert arguments == ["*", *inspect.signature(coca).parameters]
    assert "    vision_norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'," in lines
    assert "    dim: int = 64," in lines
    assert "rains on a laptop CPU" in lines[last + 1]


CLASSIC_VIT = {"vision_norm", "vision_feed_forward", "vision_position"}
CLASSIC_TEXT = {"text_norm", "text_feed_forward", "text_position"}
LAYERS = {"vision_layers", "text_layers", "multimodal_layers"}
SHAPE = {"dim", "num_heads", *LAYERS}
MULTIPLIERS = {"vision_ffn_multiplier", "text_ffn_multiplier"}
TINY = {"vocab_size", "context_length", "num_queries", "image_size", "patch_size"}
PRESETS = [  # preset, the general builder, the preset it is a size of, and the defaults that differ from that
    (grr_vit, vision_transformer, vision_transformer, set()),
    (baseline_vit, vision_transformer, vision_transformer, {"norm", "feed_forward", "position"}),
    (grr_coca, coca, coca, set()),
    (baseline_coca, coca, grr_coca, CLASSIC_VIT),
    (original_coca, coca, grr_coca, CLASSIC_VIT | CLASSIC_TEXT),
    (grr_coca_tiny, coca, grr_coca, SHAPE | TINY),
    (MODELS["grr_coca_small"], coca, grr_coca, {"image_size"} | SHAPE),
    (MODELS["grr_coca_large"], coca, grr_coca, {"dim", "num_heads", "vision_layers"}),
    (grr_coca_2b, coca, grr_coca, SHAPE | MULTIPLIERS),
    (original_coca_2b, coca, original_coca, {"vocab_size"} | SHAPE | MULTIPLIERS),
    (OPEN_CLIP_MODELS["open_clip_coca_vit_b_32"], open_clip_coca, open_clip_coca, set()),
    (
        OPEN_CLIP_MODELS["open_clip_coca_vit_l_14"],
        open_clip_coca,
        open_clip_coca,
        {"patch_size", "vision_dim", "vision_heads", "vision_layers", "dim", "num_heads"},
    ),
    (
        OPEN_CLIP_MODELS["open_clip_coca2_vit_b_32"],
        open_clip_coca,
        open_clip_coca,
        {"correct_cls_mask", "cascade_pooler"},
    ),
    (
        OPEN_CLIP_MODELS["open_clip_coca2_moderntext_vit_b_32"],
        open_clip_coca,
        open_clip_coca,
        {"cascade_pooler", "text_arch"},
    ),
]


@pytest.mark.parametrize(("preset", "general", "base", "changed"), PRESETS, ids=[row[0].__name__ for row in PRESETS])
def test_a_preset_takes_all_arguments_of_its_builder_and_differs_in_some_defaults(preset, general, base, changed):
    mine, theirs = (inspect.signature(builder) for builder in (preset, general))
    assert list(mine.parameters) == list(theirs.parameters)
    assert mine.return_annotation is theirs.return_annotation
    for name, parameter in mine.parameters.items():
        assert (parameter.kind, parameter.annotation) == (parameter.KEYWORD_ONLY, theirs.parameters[name].annotation)
    defaults = inspect.signature(base).parameters
    assert {name for name, p in mine.parameters.items() if p.default != defaults[name].default} == changed


def test_every_preset_is_compared_with_its_builder():
    assert set((MODELS | OPEN_CLIP_MODELS).values()) - {open_clip_coca} <= {row[0] for row in PRESETS}


@pytest.mark.parametrize(("preset", "general"), [row[:2] for row in PRESETS], ids=[row[0].__name__ for row in PRESETS])
def test_a_preset_hands_every_argument_to_its_builder(preset, general, monkeypatch):
    received: dict[str, object] = {}
    monkeypatch.setitem(preset.__globals__, general.__name__, lambda **arguments: received.update(arguments))
    given = {name: object() for name in inspect.signature(preset).parameters}
    preset(**given)
    assert received == given


def test_a_model_is_made_by_its_name():
    assert {*MODELS, *OPEN_CLIP_MODELS} == set(list_models())
    torch.manual_seed(0)
    one = create_model("grr_coca_tiny", vision_position="rope_2d", dim=32)
    torch.manual_seed(0)
    other = grr_coca_tiny(vision_position="rope_2d", dim=32)
    assert repr(one) == repr(other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_builder_of_your_own_is_made_by_its_name(monkeypatch):
    monkeypatch.setitem(MODELS, "mine", lambda **arguments: grr_coca_tiny(**arguments))
    assert "mine" in list_models()
    assert create_model("mine", dim=32).dim == 32


def test_a_wrong_name_and_a_wrong_argument_are_named():
    with pytest.raises(ValueError, match=r"create_model: name must be one of grr_coca, .*, got 'grr_cocoa' \(did you"):
        create_model("grr_cocoa")
    with pytest.raises(TypeError, match=r"grr_coca_tiny takes no argument 'dims' \(did you mean dim\?\); help\(grr\."):
        create_model("grr_coca_tiny", dims=32)


def test_a_preset_of_an_argument_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="dims=32"):
        preset(coca, "mine", "Mine.", dims=32)


@pytest.mark.parametrize("builder", (MODELS | OPEN_CLIP_MODELS).values(), ids=(MODELS | OPEN_CLIP_MODELS).keys())
def test_every_block_and_every_tower_has_the_dropout_that_is_asked_for(builder):
    model = on_meta(builder, dropout=0.15)
    dropped = [m for m in model.modules() if isinstance(m, Block | VisionTransformer | TextDecoder)]
    assert len(dropped) == len([m for m in model.modules() if isinstance(m, Block)]) + 2
    assert {m.dropout.p for m in dropped} == {0.15}


def test_a_tower_drops_what_its_first_block_reads():
    for tower, x in (
        (
            vision_transformer(num_layers=0, image_size=32, patch_size=8, dim=64, num_heads=2, dropout=0.5),
            torch.rand(2, 3, 32, 32),
        ),
        (text_decoder(num_layers=0, vocab_size=512, dim=64, num_heads=2, dropout=0.5), torch.randint(1, 512, (2, 9))),
    ):
        torch.manual_seed(0)
        kept, dropped = tower.eval()(x), tower.train()(x)
        assert 0.3 < (dropped == 0).double().mean() < 0.7
        torch.testing.assert_close(dropped[dropped != 0], 2 * kept[dropped != 0])


@pytest.mark.parametrize("learned", [False, True])
def test_similarities_are_divided_by_the_temperature(learned):
    model = grr_coca_tiny(temperature=0.05, logit_bias=-3.0, learned_temperature=learned)
    output = model(torch.rand(1, 3, 32, 32), torch.tensor([[510, 7, 1, 511]]))
    torch.testing.assert_close(output.scale, torch.tensor([20.0]))
    torch.testing.assert_close(output.bias, torch.tensor([-3.0]))


def test_a_learned_temperature_stays_above_a_hundredth():
    """CLIP, section 2.5: the scale of the similarities is clipped at 100."""
    model = grr_coca_tiny(temperature=0.001, learned_temperature=True)
    output = model(torch.rand(1, 3, 32, 32), torch.tensor([[510, 7, 1, 511]]))
    torch.testing.assert_close(output.scale, torch.tensor([100.0]))


def test_a_model_prints_what_it_is_made_of():
    text = repr(on_meta(grr_coca))
    assert "(0-11): 12 x Block(" in text
    for part in ("RMSNorm(768)", "RotaryEmbedding(64, base=10000)", "num_queries=64, num_heads=12", "temperature=0.07"):
        assert part in text
    assert len(text.splitlines()) < 120


def test_parameters_are_at_least_one_dimensional_because_fsdp_refuses_scalars():
    assert all(p.dim() >= 1 for p in on_meta(grr_coca, learned_temperature=True).parameters())


def test_blocks_do_not_start_from_the_same_weights():
    blocks = grr_coca_tiny().vision_encoder.blocks
    assert not torch.equal(blocks[0].attention.qkv.weight, blocks[1].attention.qkv.weight)


@pytest.mark.parametrize(
    "option",
    [
        {"qk_norm": True},
        {"pooler_norm": True},
        {"tied_embeddings": True},
        {"learned_temperature": True},
        {"text_position": "learned"},
        {"text_position": "sinusoidal"},
        {"vision_position": "rope_mixed"},
    ],
)
def test_what_leaves_the_paper_is_an_option_that_runs_and_learns(option):
    model = grr_coca_tiny(**option)
    output = model(torch.rand(2, 3, 32, 32), torch.tensor([[510, 7, 1, 511], [510, 8, 1, 511]]))
    (output.logits.sum() + (output.image_embeddings * output.scale).sum() + output.text_embeddings.sum()).backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused == (["logit_scale.bias"] if "learned_temperature" in option else [])
    if "tied_embeddings" in option:
        assert parameters(grr_coca_tiny()) - parameters(model) == 512 * 64


class MeanColour(nn.Module):
    """Somebody else's vision encoder: images -> [b, 1, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images.mean((2, 3))).unsqueeze(1)


class BagOfWords(nn.Module):
    """Somebody else's text decoder: ids alone -> [b, s, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).cumsum(1)


def test_a_users_own_towers_drop_in():
    ours = grr_coca_tiny()
    model = CoCa(
        vision_encoder=MeanColour(),
        generative_pooler=AttentionPooler(64, 16, 2),
        contrastive_pooler=AttentionPooler(64, 1, 2),
        text_decoder=BagOfWords(),
        multimodal_decoder=ours.multimodal_decoder,
    )
    ids = torch.tensor([[510, 7, 8, 1, 0, 0, 511]])
    output = model(torch.randint(0, 256, (1, 3, 10, 10), dtype=torch.uint8), ids)
    assert output.image_embeddings.shape == output.text_embeddings.shape == (1, 64)
    assert output.logits.shape == (1, 7, 512)


@pytest.mark.slow
def test_compiled_and_bfloat16_models_are_the_same_function():
    torch.manual_seed(0)
    model = grr_coca_tiny()
    images, ids = torch.rand(2, 3, 32, 32), torch.tensor([[510, 7, 8, 1, 511], [510, 9, 1, 511, 0]])
    expected = model(images, ids)
    compiled = torch.compile(model)(images, ids)
    torch.testing.assert_close(compiled.logits, expected.logits, atol=1e-5, rtol=1e-5)
    half = model.to(torch.bfloat16)(images, ids)
    torch.testing.assert_close(half.logits.float(), expected.logits, atol=0.05, rtol=0.05)
    assert (half.image_embeddings * expected.image_embeddings).sum(-1).min() > 0.999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 100}, "image_size must be a multiple of patch_size, got image_size=100, patch_size=8"),
        ({"vision_norm": "batchnorm"}, "norm must be one of rmsnorm, layernorm, got 'batchnorm'"),
        ({"text_position": "rope_2d"}, "position must be one of rope, sinusoidal, learned, got 'rope_2d'"),
        ({"num_heads": 3}, "dim must be a multiple of num_heads, got dim=64, num_heads=3"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        grr_coca_tiny(**arguments)


BUILDERS = (vision_transformer, text_decoder, grr_coca_tiny, open_clip_coca)
SIZES = [
    (builder, name)
    for builder in BUILDERS
    for name, parameter in inspect.signature(builder).parameters.items()
    if type(parameter.default) is int
]


@pytest.mark.parametrize(("builder", "name"), SIZES)
def test_a_size_that_is_not_a_positive_int_is_named(builder, name):
    too_low = {"vocab_size": 1, "context_length": 3}.get(name, -1 if name.endswith("layers") else 0)
    for value in ("64", 64.0, None, True, -64, too_low):
        with pytest.raises(ValueError, match=rf": {name} must be an int of at least \d, got {name}={value!r}; give"):
            builder(**{name: value})


@pytest.mark.parametrize("temperature", [math.nan, math.inf, 0, -1.0, "0.07", None])
def test_a_temperature_that_is_not_positive_and_finite_is_named(temperature):
    for builder in (grr_coca_tiny, OPEN_CLIP_MODELS["open_clip_coca_vit_b_32"]):
        with (
            torch.device("meta"),
            pytest.raises(ValueError, match="LogitScale: temperature must be positive and finite, got"),
        ):
            builder(temperature=temperature)


def test_the_eight_variants_of_the_paper_differ_by_less_than_one_percent():
    choices = itertools.product(["rmsnorm", "layernorm"], ["geglu", "mlp"], ["rope", "sinusoidal"])
    counts = [parameters(on_meta(vision_transformer, norm=n, feed_forward=f, position=p)) for n, f, p in choices]
    assert len(set(counts)) == 4  # positions cost nothing
    assert max(counts) / min(counts) < 1.01


def test_a_builder_without_the_arguments_that_recipes_set_is_refused():
    def positional(vocab_size: int = 64, context_length: int = 8, image_size: int = 32) -> CoCa: ...

    def lacking(*, vocab_size: int = 64, context_length: int = 8) -> CoCa: ...

    for builder in MODELS.values():
        check_builder(builder)
    with pytest.raises(ValueError, match=r"positional lacks vocab_size, context_length, image_size; add them"):
        check_builder(positional)
    with pytest.raises(ValueError, match=r"keyword-only arguments .* lacking lacks image_size;"):
        check_builder(lacking)
