"""Heads are the parts of a CoCa and no copies; what they read is what the CoCa would read at the same place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from grr.data.collate import collate_captions, right_pad
from grr.data.images import normalize
from grr.models.builders import grr_coca_tiny
from grr.models.heads import HEADS, image_classifier, image_text_classifier
from grr.models.open_clip import open_clip_coca
from grr.parallel.initialize import initialize
from grr.parallel.shard import shard_over

pytestmark = pytest.mark.usefixtures("process_group")

CLASSES = ["cat", "dog", "eel"]
COCAS = {
    "grr": grr_coca_tiny,
    "tied, learned, 2-D": lambda **more: grr_coca_tiny(
        vision_position="rope_2d", text_position="learned", pooler_norm=True, tied_embeddings=True, **more
    ),
    "open_clip": lambda **more: open_clip_coca(
        vocab_size=512,
        context_length=16,
        image_size=32,
        patch_size=8,
        vision_dim=48,
        vision_heads=2,
        vision_layers=1,
        num_queries=5,
        pooler_heads=2,
        dim=64,
        num_heads=2,
        text_layers=1,
        multimodal_layers=1,
        **more,
    ),
}
COCAS["moderntext"] = lambda **more: COCAS["open_clip"](cascade_pooler=True, text_arch="modern", **more)


@pytest.fixture(params=COCAS)
def coca(request) -> nn.Module:
    torch.manual_seed(0)
    return COCAS[request.param]().eval()


def images(b: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (b, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """BOS, tokens, EOS, PAD ..., CLS, PAD: 17 ids."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 510, (n,), generator=generator).tolist() for n in lengths]
    return [[510, *t, 1, *[0] * (13 - len(t)), 511, 0] for t in tokens]


# --- what they compute ---------------------------------------------------------------------------------------------


def test_an_image_classifier_reads_the_image_context_of_the_coca(coca):
    head = image_classifier(coca, 3).eval()
    read = head.task_pooler(coca.image_context(images()))[:, 0]
    torch.testing.assert_close(head(images()), head.classifier(head.norm(read)))
    torch.testing.assert_close(head(normalize(images())), head(images()))
    torch.testing.assert_close(head(images(), torch.tensor([[510, 1, 511]] * 2)), head(images()))


def test_an_image_text_classifier_reads_the_input_of_the_vocabulary_head_at_cls(coca):
    """With the vocabulary head for its classes, it gives the logits of the CoCa at CLS."""
    head = image_text_classifier(coca, 3).eval()
    head.classifier = coca.multimodal_decoder.head
    ids = torch.tensor(rows([4, 9]))[:, :-1]
    packed, positions = right_pad(ids)
    logits = coca(images(), packed, positions=positions).logits
    expected = logits[[0, 1], [6, 11]]  # behind BOS, 4 or 9 tokens, and EOS
    torch.testing.assert_close(head(images(), ids), expected)
    torch.testing.assert_close(head(images(), packed, positions=positions), expected)


@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    name=st.sampled_from(list(COCAS)),
)
def test_a_batch_trimmed_to_its_longest_text_scores_as_texts_alone(lengths, seed, name):
    torch.manual_seed(seed)
    head = image_text_classifier(COCAS[name](), 3).eval()
    pictures, texts = images(len(lengths), seed), rows(lengths, seed)
    ids, positions, *_ = collate_captions(texts)
    together = head(pictures, ids, positions=positions)
    for i, text in enumerate(texts):
        alone = head(pictures[i : i + 1], torch.tensor([text[:-1]]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_logits_depend_on_the_image_and_on_every_word(coca):
    head = image_text_classifier(coca, 3).eval()
    ids = torch.tensor(rows([5]))[:, :-1]
    score = head(images(1), ids)
    assert not torch.allclose(head(images(1, seed=1), ids), score)
    for place in range(1, 6):
        changed = ids.clone()
        changed[0, place] = 3 + (ids[0, place] - 2) % 500
        assert not torch.allclose(head(images(1), changed), score), place


# --- what they are made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_a_head_shares_the_parts_of_the_coca_and_trains_all_its_parameters(coca, name):
    head = HEADS[name](coca, 3).train()
    theirs = {id(p): key for key, p in coca.named_parameters()}
    new = {key for key, p in head.named_parameters() if id(p) not in theirs}
    assert all(key == theirs.get(id(p), key) for key, p in head.named_parameters())
    assert {key.split(".")[0] for key in new} == {"classifier"} | (
        {"task_pooler", "norm"} if name == "image_classifier" else set()
    )
    head(images(8), torch.tensor(rows([4] * 8))[:, :-1]).square().sum().backward()
    still = [key for key, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_a_coca_computes_the_same_after_heads_are_built_on_it(coca):
    ids = torch.tensor(rows([4, 9]))[:, :-1]
    before = coca(images(), ids)
    image_classifier(coca, 3), image_text_classifier(coca, 5)
    torch.testing.assert_close(coca(images(), ids), before)


def test_dropout_applies_to_the_vector_that_is_classified():
    torch.manual_seed(0)
    coca = grr_coca_tiny()
    ids = torch.tensor(rows([4]))[:, :-1]
    for head in (image_classifier(coca, 3, dropout=0.5), image_text_classifier(coca, 3, dropout=0.5)):
        assert not torch.equal(head(images(1), ids), head(images(1), ids))
        head.eval()
        assert torch.equal(head(images(1), ids), head(images(1), ids))


@pytest.mark.parametrize("name", HEADS)
def test_fewer_than_two_classes_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: num_classes must be at least 2, got num_classes=1"):
        HEADS[name](grr_coca_tiny(), 1)


# --- meta device, shards, files ------------------------------------------------------------------------------------


def filled(name: str, *, sharded: bool, seed: int = 0) -> nn.Module:
    with torch.device("meta"):
        head = HEADS[name](grr_coca_tiny(), len(CLASSES))
    if sharded:
        shard_over(head, init_device_mesh("cpu", (1,)))
    initialize(head, torch.device("cpu"), seed=seed)
    return head


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_built_on_the_meta_device_and_sharded_is_the_same_function(name):
    ids = torch.tensor(rows([4, 9]))[:, :-1]
    plain, sharded = filled(name, sharded=False), filled(name, sharded=True)
    torch.testing.assert_close(sharded(images(), ids), plain(images(), ids))
    sharded(images(), ids).sum().backward()
    assert all(hasattr(p.grad, "full_tensor") for p in sharded.parameters())
