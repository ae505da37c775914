"""What each output of a CoCa may depend on, and that trimming, packing and caching change nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_rows import label_rows

from grr.components import ClassToken, LayerNorm, LearnedPositions, PatchEmbedding
from grr.data.collate import IGNORE, collate_captions, right_pad
from grr.models.builders import grr_coca_tiny
from grr.models.coca import CoCa, VisionTransformer
from grr.parallel.parallelize import parallelize
from grr.training.loss import contrastive_loss

PAD, EOS, BOS, CLS, CONTEXT = 0, 1, 510, 511, 16
captions = st.lists(st.lists(st.integers(3, 509), max_size=CONTEXT - 3), min_size=1, max_size=4)


def layout(tokens: list[int]) -> list[int]:
    """SPEC's row: BOS t1 ... tn EOS PAD ... PAD CLS PAD."""
    return [BOS, *tokens, EOS, *[PAD] * (CONTEXT - 3 - len(tokens)), CLS, PAD]


def rows(captions: list[list[int]]) -> torch.Tensor:
    return torch.tensor([layout(c) for c in captions])


@pytest.fixture(scope="module", params=["rope", "sinusoidal"])
def model(request):
    torch.manual_seed(0)
    return grr_coca_tiny(text_position=request.param).double()


def some_images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


@given(captions=captions)
def test_a_trimmed_packed_batch_is_the_same_function_as_the_padded_one(model, captions):
    whole, images = rows(captions), some_images(len(captions))
    ids, positions, cls_places, label_places, labels, n = collate_captions([layout(c) for c in captions])
    given = {"positions": positions, "cls_places": cls_places, "label_places": label_places, "labels": labels}
    packed = model(images, ids, **given)
    padded = model(images, whole[:, :-1])
    following = whole[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        padded.logits.flatten(0, 1),
        following.masked_fill((following == PAD) | (following == CLS), IGNORE).flatten(),
    )
    torch.testing.assert_close(packed.text_embeddings, padded.text_embeddings)
    torch.testing.assert_close(packed.image_embeddings, padded.image_embeddings)
    torch.testing.assert_close(packed.token_losses.sum() / n, expected)
    assert not packed.token_losses[n:].any()
    by_row = model(images, ids, positions=positions, labels=label_rows(collate_captions([layout(c) for c in captions])))
    torch.testing.assert_close(by_row.token_losses, packed.token_losses[:n])
    torch.testing.assert_close(by_row.text_embeddings, packed.text_embeddings)


def test_rows_of_a_batch_do_not_depend_on_each_other(model):
    ids, images = rows([[7, 8], [9], [10, 11, 12]])[:, :-1], some_images(3)
    whole = model(images, ids)
    for i in range(3):
        alone = model(images[i : i + 1], ids[i : i + 1])
        torch.testing.assert_close(whole.image_embeddings[i], alone.image_embeddings[0])
        torch.testing.assert_close(whole.text_embeddings[i], alone.text_embeddings[0])
        torch.testing.assert_close(whole.logits[i], alone.logits[0])
        torch.testing.assert_close(whole.image_embeddings[i], model.encode_image(images[i : i + 1])[0])


def test_each_loss_has_gradients_in_the_parts_that_it_reads():
    """The contrastive pooler reads what the generative one gives; captions are learned through both."""
    torch.manual_seed(0)
    model = grr_coca_tiny()
    ids, positions, _, label_places, labels, _ = collate_captions([layout([7, 8]), layout([9])])
    images = torch.rand(2, 3, 32, 32)

    def taught(loss: torch.Tensor) -> set[str]:
        model.zero_grad()
        loss.backward()
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    output = model(images, ids, positions=positions, labels=labels, label_places=label_places)
    read_by_both = {"vision_encoder", "generative_pooler", "text_decoder"}
    assert taught(output.token_losses.mean()) == read_by_both | {"multimodal_decoder"}
    output = model(images, ids, positions=positions, labels=labels, label_places=label_places)
    contrast = contrastive_loss(output.image_embeddings, output.text_embeddings)
    assert taught(contrast) == read_by_both | {"contrastive_pooler"}


@given(captions=captions, column=st.integers(1, CONTEXT - 2), token=st.integers(3, 509))
def test_no_logit_depends_on_a_later_token_nor_on_cls(model, captions, column, token):
    ids, images = rows(captions)[:, :-1], some_images(len(captions))
    changed = ids.clone()
    changed[:, column] = token
    changed[:, -1] = token  # where CLS stood
    before, after = model(images, ids).logits, model(images, changed).logits
    real = (ids != PAD) & (torch.arange(CONTEXT) < column)  # what is written at padding is never read
    torch.testing.assert_close(before[real], after[real], atol=1e-12, rtol=0)


@given(captions=captions, padding=st.integers(1, 8))
def test_the_text_embedding_does_not_depend_on_the_padding_before_cls(model, captions, padding):
    ids = rows(captions)[:, :-1]
    packed, positions = right_pad(ids)
    more = torch.cat((packed, torch.zeros(len(ids), padding, dtype=torch.long)), dim=1)
    places = torch.cat((positions, positions[:, -1:].expand(-1, padding)), dim=1)
    expected = model.encode_text(ids)
    torch.testing.assert_close(model.encode_text(more, positions=places), expected, atol=1e-12, rtol=0)


def test_cls_reads_the_whole_caption(model):
    ids = rows([[5, 6, 7]])[:, :-1]
    for column in range(5):
        changed = ids.clone()
        changed[0, column] = 9
        assert (model.encode_text(changed) - model.encode_text(ids)).abs().max() > 1e-6


def test_the_text_embedding_does_not_depend_on_the_image_nor_the_reverse(model):
    ids, images = rows([[5, 6], [7, 8]])[:, :-1], some_images(2)
    output = model(images, ids)
    torch.testing.assert_close(model(images.flip(0), ids).text_embeddings, output.text_embeddings)
    torch.testing.assert_close(model(images, ids.flip(0)).image_embeddings, output.image_embeddings)
    torch.testing.assert_close(model.encode_image(images), output.image_embeddings)
    torch.testing.assert_close(model.encode_text(ids), output.text_embeddings)
    assert (model(images.flip(0), ids).logits - output.logits).abs().max() > 1e-6


def test_embeddings_have_unit_length_and_uint8_images_are_normalised_inside():
    model = grr_coca_tiny()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    embeddings = model.encode_image(images)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(model.encode_image((images / 255 - mean) / deviation), embeddings)


def test_a_vision_encoder_refuses_bytes_that_are_not_normalised():
    with pytest.raises(ValueError, match=r"VisionTransformer: images must be .* got torch\.uint8; .*normalize"):
        grr_coca_tiny().vision_encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_an_encoder_that_returns_a_map_instead_of_vectors_is_refused():
    model = grr_coca_tiny()
    model.vision_encoder = torch.nn.Conv2d(3, 64, kernel_size=8, stride=8)
    with pytest.raises(ValueError, match=r"vision_encoder must map .* to \[b, p, d\], got \[2, 64, 4, 4\] of 2"):
        model.encode_image(some_images(2).float())


@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_split_into_cached_calls_has_the_same_next_token_logits(model, pieces, seed):
    ids = torch.randint(3, 510, (2, sum(pieces)), generator=torch.Generator().manual_seed(seed))
    images = some_images(2)
    context = model.image_context(images)
    caches = model.caches(context.shape[1], sum(pieces))
    expected = model(images, ids).logits
    start = 0
    for piece in pieces:
        span = torch.arange(start, start + piece)
        logits = model.next_token_logits(ids[:, span], context, positions=span, caches=caches)
        start += piece
        torch.testing.assert_close(logits, expected[:, start - 1])


def test_a_checkpointed_model_has_the_same_gradients_with_dropout_drawn_again():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = grr_coca_tiny(dropout=0.3)
        parallelize(model, torch.device("cpu"), activation_checkpointing=checkpointed)
        torch.manual_seed(1)
        model(torch.ones(2, 3, 32, 32), rows([[5], [6]])[:, :-1]).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_class_token_precedes_the_patches_and_the_input_of_the_blocks_is_normalised():
    torch.manual_seed(0)
    parts = {"patches": PatchEmbedding(8, 4), "positions": LearnedPositions(8, 5), "class_token": ClassToken(8)}
    vision, images = VisionTransformer(**parts, norm=LayerNorm(8), blocks=[]), torch.randn(2, 3, 8, 8)
    tokens = torch.cat((parts["class_token"].weight.expand(2, 1, 8), parts["patches"](images)), dim=1)
    expected = torch.nn.functional.layer_norm(tokens + parts["positions"].weight, (8,))
    torch.testing.assert_close(vision(images), expected)


def test_an_image_with_more_tokens_than_learned_positions_is_refused():
    vision = VisionTransformer(patches=PatchEmbedding(8, 4), positions=LearnedPositions(8, 4), blocks=[])
    assert vision(torch.zeros(2, 3, 8, 8)).shape == (2, 4, 8)
    with pytest.raises(ValueError, match=r"at most 4 tokens, one per learned position, got 6 in 8 x 12 pixels; resize"):
        vision(torch.zeros(2, 3, 8, 12))


def test_a_class_token_with_two_axes_is_refused():
    with pytest.raises(
        ValueError, match=r"VisionTransformer: a class token does not have a row and a column, got .* axes=2"
    ):
        VisionTransformer(patches=PatchEmbedding(8, 4), blocks=[], class_token=ClassToken(8), axes=2)


def test_the_vector_at_cls_is_projected_to_the_width_of_an_embedding():
    torch.manual_seed(0)
    plain = grr_coca_tiny()
    parts = {
        name: getattr(plain, name)
        for name in ("vision_encoder", "generative_pooler", "text_decoder", "multimodal_decoder")
    }
    narrow, projection = torch.nn.Linear(64, 5), torch.nn.Linear(64, 5)
    model = CoCa(**parts, contrastive_pooler=narrow, text_projection=projection)
    ids, images = rows([[7, 8]]), some_images(1)
    cls = plain.text_decoder(ids[:, :-1])[:, -1]
    torch.testing.assert_close(model.encode_text(ids), torch.nn.functional.normalize(projection(cls), dim=-1))
    assert model.encode_image(images.float()).shape == (1, 5)
    assert (model.dim, model.pooler_heads) == (64, 2)
