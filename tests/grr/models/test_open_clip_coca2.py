"""The coca2 models of open_clip's main branch: laws, and the numbers of their formulas in float64."""

import copy
from pathlib import Path

import pytest
import torch
from coca2_formulas import PUBLISHED, Formulas, is_modern, random_weights, shapes, small
from hypothesis import example, given
from hypothesis import strategies as st
from numbered import BOS, CLS, PAD, ROOM, Spelled, captions, rows, some_images
from torch import Tensor, nn

from grr.data.collate import collate_captions
from grr.generation.generate import generate
from grr.inference.convert import CLIP_MEAN, CLIP_STD, convert_open_clip
from grr.models.builders import create_model
from grr.models.coca import CoCa
from grr.models.open_clip import OPEN_CLIP_MODELS, open_clip_coca
from grr.models.open_clip_config import model_arguments
from grr.parallel.initialize import initialize
from grr.training.loss import contrastive_loss

BUILDERS = {
    "coca2_ViT-B-32": "open_clip_coca2_vit_b_32",
    "coca2-moderntext_ViT-B-32": "open_clip_coca2_moderntext_vit_b_32",
}
exactly = {"atol": 1e-5, "rtol": 1e-5}


def one_pooler(name: str) -> dict:
    """Modern text decoders behind the one pooler of the released models."""
    description = small(name)
    description["vision_cfg"]["attentional_pool"] = True
    return description


DESCRIPTIONS = {
    "coca2": small("coca2_ViT-B-32"),
    "moderntext": small("coca2-moderntext_ViT-B-32"),
    "equal widths": small("coca2_ViT-B-32", vision_width=32),
    "modern, one pooler": one_pooler("coca2-moderntext_ViT-B-32"),
}


def converted(description: dict, weights: dict[str, Tensor]) -> CoCa:
    model = open_clip_coca(**model_arguments(Path("config.json"), description))
    model.load_state_dict(convert_open_clip(weights, model))
    return model.eval()


@pytest.fixture(scope="module", params=DESCRIPTIONS)
def both(request) -> tuple[Formulas, CoCa]:
    description = DESCRIPTIONS[request.param]
    weights = random_weights(description)
    return Formulas(description, weights), converted(description, weights)


@pytest.fixture(scope="module", params=["coca2", "moderntext"])
def model(request) -> CoCa:
    return converted(DESCRIPTIONS[request.param], random_weights(DESCRIPTIONS[request.param]))


def as_clip_has_them(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (images.double() / 255 - mean) / std


# --- laws -----------------------------------------------------------------------------------------------------------


@given(captions=captions)
def test_a_trimmed_packed_batch_is_the_same_function_as_the_padded_one(model, captions):
    images, whole = some_images(len(captions)), rows(captions)
    batch = collate_captions(whole.tolist())
    with torch.no_grad():
        padded = model(images, whole[:, :-1])
        packed = model(images, batch.ids, positions=batch.positions)
        placed = model.embed(images, batch.ids, positions=batch.positions, cls_places=batch.cls_places)
    torch.testing.assert_close(packed.text_embeddings, padded.text_embeddings, **exactly)
    torch.testing.assert_close(placed.text_embeddings, padded.text_embeddings, **exactly)


@given(captions=captions)
def test_the_embedding_of_a_modern_text_is_that_at_eos_and_nothing_depends_on_cls(captions):
    description = DESCRIPTIONS["moderntext"]
    model = converted(description, random_weights(description))
    ids, images = rows(captions)[:, :-1], some_images(len(captions))
    with torch.no_grad():
        before = model(images, ids)
        model.text_decoder.embedding.weight[CLS] = torch.randn(32)
        after = model(images, ids)
        vectors = model.text_projection(model.text_decoder(ids))
    at_eos = vectors[torch.arange(len(ids)), torch.tensor([len(caption) + 1 for caption in captions])]
    torch.testing.assert_close(before.text_embeddings, nn.functional.normalize(at_eos, dim=-1), **exactly)
    assert torch.equal(before.text_embeddings, after.text_embeddings)
    read = (ids != PAD) & (ids != CLS)
    torch.testing.assert_close(before.logits[read], after.logits[read])


@given(order=st.permutations(range(6)))
def test_the_contrastive_pooler_of_a_cascade_reads_all_vectors_and_captions_too(model, order):
    context, ids = model.image_context(some_images(2)), rows([[3, 4], [5]])[:, :-1]
    assert context.shape == (2, 6, 32)
    with torch.no_grad():
        before, permuted = (model.from_context(x, ids) for x in (context, context[:, order]))
    torch.testing.assert_close(permuted.image_embeddings, before.image_embeddings, **exactly)
    torch.testing.assert_close(permuted.logits, before.logits, **exactly)
    for i in range(6):
        changed = context.clone()
        changed[:, i] += torch.linspace(-1, 1, 32)
        with torch.no_grad():
            after = model.from_context(changed, ids)
        assert (after.image_embeddings - before.image_embeddings).abs().max() > 1e-4
        assert (after.logits - before.logits)[..., :CLS].abs().max() > 1e-4


# --- agreement ------------------------------------------------------------------------------------------------------


@given(captions=captions)
@example(captions=[[], [5] * (ROOM - 1), list(range(1, ROOM + 1)), [7]])
def test_embeddings_and_logits_are_those_of_the_formulas(both, captions):
    formulas, model = both
    ids, images = rows(captions)[:, :-1], some_images(len(captions))
    with torch.no_grad():
        image, text, logits = formulas(as_clip_has_them(images), ids[:, :-1])
        output = model(images, ids)
    torch.testing.assert_close(output.image_embeddings.double(), image, **exactly)
    torch.testing.assert_close(output.text_embeddings.double(), text, **exactly)
    read = ids[:, :-1] != PAD  # what is computed at PAD differs, and nothing reads it
    torch.testing.assert_close(output.logits[:, :-1, :CLS][read].double(), logits[read], **exactly)


def test_gradients_are_those_of_the_formulas(both):
    """What is converted are gradients, by the same table as weights."""
    formulas, model = both
    formulas, model = copy.copy(formulas), copy.deepcopy(model)
    formulas.w = {name: weight.clone().requires_grad_() for name, weight in formulas.w.items()}
    ids, images = rows([[3, 4, 5], [6], list(range(1, ROOM + 1))]), some_images(3)
    image, text, logits = formulas(as_clip_has_them(images), ids[:, :-2])
    output = model(images, ids[:, :-1])
    for one, other, scale, scores in (
        (image, text, formulas.w["logit_scale"].exp(), logits),
        (output.image_embeddings, output.text_embeddings, output.scale, output.logits[:, :-1]),
    ):
        targets = ids[:, 1:-2].flatten()
        captioning = nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), targets, ignore_index=PAD)
        (contrastive_loss(one, other, 1 / scale) + captioning).backward()
    expected = convert_open_clip({name: weight.grad for name, weight in formulas.w.items()}, model)
    for name, parameter in model.named_parameters():
        if name.startswith("vision_encoder.patches") or name == "logit_scale.bias":
            continue  # scaled, and no part of theirs
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_have_the_published_parameters(name):
    """The numbers are those of open_clip's own module, built from these descriptions."""
    theirs = sum(torch.Size(shape).numel() for shape in shapes(PUBLISHED[name]).values())
    assert theirs == {"coca2_ViT-B-32": 254_351_617, "coca2-moderntext_ViT-B-32": 263_526_657}[name]
    arguments = model_arguments(Path("config.json"), PUBLISHED[name])
    with torch.device("meta"):
        model, named = open_clip_coca(**arguments), create_model(BUILDERS[name])
        weights = {key: torch.empty(shape) for key, shape in shapes(PUBLISHED[name]).items()}
    assert {key: p.shape for key, p in model.state_dict().items()} == {
        key: p.shape for key, p in named.state_dict().items()
    }
    cls = 512 if is_modern(PUBLISHED[name]) else 0  # a row of the embedding that open_clip does not have
    assert sum(p.numel() for p in model.parameters()) == theirs + 768 + 1 + cls  # biases of patches and similarities
    assert sum(weight.numel() for weight in weights.values()) == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_outputs_are_those_of_an_open_clip_that_has_the_model(name):
    coca_model = pytest.importorskip("open_clip.coca_model", reason="pip install open_clip_torch")
    if not hasattr(coca_model, "ModernMultimodalTransformer"):
        pytest.skip("the installed open_clip does not have coca2")
    description = small(name)
    peer = coca_model.CoCa(**{key: value for key, value in description.items() if key != "custom_text"}).eval()
    weights = random_weights(description)
    peer.load_state_dict(weights)
    model, ids, images = converted(description, weights), rows([[3, 4, 5], [], list(range(1, 9))]), some_images(3)
    with torch.no_grad():
        theirs = peer(as_clip_has_them(images).float(), ids[:, :-2])
        output = model(images, ids[:, :-1])
    torch.testing.assert_close(output.image_embeddings, theirs["image_features"], **exactly)
    torch.testing.assert_close(output.text_embeddings, theirs["text_features"], **exactly)
    read = ids[:, :-2] != PAD
    torch.testing.assert_close(output.logits[:, :-1, :CLS][read], theirs["logits"][read], **exactly)


# --- use ------------------------------------------------------------------------------------------------------------


def test_greedy_captions_are_those_of_the_formulas(both):
    formulas, model = both
    images = some_images(8)
    context = formulas.images(as_clip_has_them(images))[1]
    text = torch.full((8, 1), BOS)
    for _ in range(ROOM):
        logits = formulas.logits(context, formulas.texts(text)[1])[:, -1]
        logits[:, [PAD, BOS]] = -torch.inf
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), dim=1)
    expected = [Spelled().decode(row) for row in text[:, 1:].tolist()]
    assert generate(model, images, Spelled()) == expected
    assert len({tuple(caption) for caption in expected}) > 1


def test_beam_search_and_sampling_work(model):
    for options in ({"num_beams": 3}, {"temperature": 1.0, "top_p": 0.9}):
        written = generate(model, some_images(2), Spelled(), **options)
        assert all(token not in (PAD, BOS, CLS) for caption in written for token in caption)


@pytest.mark.parametrize("name", BUILDERS.values())
def test_a_model_can_be_trained_from_scratch(name):
    sizes = {"vocab_size": 51, "context_length": 11, "image_size": 24, "patch_size": 8, "vision_dim": 48}
    sizes |= {"vision_heads": 3, "num_queries": 6, "pooler_heads": 4, "dim": 32, "num_heads": 2}
    with torch.device("meta"):
        model = OPEN_CLIP_MODELS[name](**sizes, vision_layers=1, text_layers=1, multimodal_layers=1)
    initialize(model, torch.device("cpu"), seed=0)
    output = model(some_images(2), rows([[3, 4], [5]])[:, :-1])
    (output.image_embeddings.sum() + output.text_embeddings.sum() + output.logits[..., :CLS].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.shape != (1,))


@pytest.mark.parametrize(
    ("kind", "given_kind", "cause"),
    [
        ("coca2", {"cascade_pooler": False}, "set model.cascade_pooler=true"),
        ("modern, one pooler", {"cascade_pooler": True}, "set model.cascade_pooler=false"),
        ("moderntext", {"text_arch": "clip"}, "set model.text_arch=modern"),
        ("coca2", {"text_arch": "modern"}, "set model.text_arch=clip"),
    ],
)
def test_weights_of_another_architecture_are_refused_with_the_argument_to_set(kind, given_kind, cause):
    description = DESCRIPTIONS[kind]
    model = open_clip_coca(**model_arguments(Path("config.json"), description) | given_kind)
    with pytest.raises(ValueError, match=f"does not fit the model: it is of another architecture; {cause}"):
        convert_open_clip(random_weights(description), model)


def test_an_unknown_kind_of_text_decoders_is_refused():
    with pytest.raises(ValueError, match="open_clip_coca: text_arch must be one of clip, modern, got 'llama'"):
        open_clip_coca(text_arch="llama")
