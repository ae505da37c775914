"""Heads are the parts of a CoCa and no copies; what they read is what the CoCa would read at the same place."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from grr.checkpoint.training_state import save_checkpoint, save_model
from grr.data.collate import collate_captions, right_pad
from grr.data.images import normalize
from grr.inference.pretrained import build_pretrained, describe, find_pretrained, load_pretrained
from grr.models.builders import grr_coca_tiny
from grr.models.heads import (
    HEADS,
    describe_classifier,
    image_classifier,
    image_text_classifier,
    load_classifier,
    load_parts,
)
from grr.models.open_clip import open_clip_coca
from grr.parallel.initialize import initialize
from grr.parallel.shard import shard_over
from grr.tokenizers.sentencepiece import train_tokenizer
from grr.training.optim import adamw

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


def test_an_image_classifier_reads_the_context_that_captions_are_written_from(coca):
    head = image_classifier(coca, 3).eval()
    read = head.task_pooler(coca.image_context(images()))[:, 0]
    torch.testing.assert_close(head(images()), head.classifier(head.norm(read)))
    torch.testing.assert_close(head(normalize(images())), head(images()))
    torch.testing.assert_close(head(images(), torch.tensor([[510, 1, 511]] * 2)), head(images()))


def test_an_image_text_classifier_reads_the_vector_that_the_vocabulary_would_be_scored_with_at_cls(coca):
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
    ids, positions, _ = collate_captions(texts)
    together = head(pictures, ids, positions=positions)
    for i, text in enumerate(texts):
        alone = head(pictures[i : i + 1], torch.tensor([text[:-1]]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_an_answer_depends_on_the_image_and_on_every_word(coca):
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
def test_a_head_has_the_parts_of_the_coca_themselves_and_trains_all_it_has(coca, name):
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


def test_a_coca_still_writes_captions_beside_its_heads(coca):
    ids = torch.tensor(rows([4, 9]))[:, :-1]
    before = coca(images(), ids)
    image_classifier(coca, 3), image_text_classifier(coca, 5)
    torch.testing.assert_close(coca(images(), ids), before)


def test_dropout_falls_on_the_vector_that_is_classified():
    torch.manual_seed(0)
    coca = grr_coca_tiny()
    ids = torch.tensor(rows([4]))[:, :-1]
    for head in (image_classifier(coca, 3, dropout=0.5), image_text_classifier(coca, 3, dropout=0.5)):
        assert not torch.equal(head(images(1), ids), head(images(1), ids))
        head.eval()
        assert torch.equal(head(images(1), ids), head(images(1), ids))


@pytest.mark.parametrize("name", HEADS)
def test_one_class_is_no_choice(name):
    with pytest.raises(ValueError, match=f"{name}: there must be at least two classes .*num_classes=1"):
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
def test_a_head_built_without_memory_and_sharded_is_the_same_function(name):
    ids = torch.tensor(rows([4, 9]))[:, :-1]
    plain, sharded = filled(name, sharded=False), filled(name, sharded=True)
    torch.testing.assert_close(sharded(images(), ids), plain(images(), ids))
    sharded(images(), ids).sum().backward()
    assert all(hasattr(p.grad, "full_tensor") for p in sharded.parameters())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """The folder of a run with a model/, and of its checkpoints."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = train_tokenizer(["a cat", "a dog is an eel"], folder / "tokenizer.model", context_length=16)
    arguments = {"vocab_size": tokenizer.vocab_size, "context_length": 16, "image_size": 32, "tied_embeddings": True}
    torch.manual_seed(5)
    coca = grr_coca_tiny(**arguments)
    description = describe("grr_coca_tiny", arguments, "center")
    save_model(folder / "model", coca, description, folder / "tokenizer.model")
    progress = {"step": 3, "model": description}
    save_checkpoint(folder / "checkpoints", coca, adamw(coca), progress)
    return folder


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("where", ["model", "checkpoints/step_3"])
@pytest.mark.parametrize("sharded", [False, True])
def test_trained_parts_fill_a_head_and_what_is_new_stays_as_it_was_drawn(pretrained, name, where, sharded):
    source = find_pretrained(pretrained / where)
    trained = weights(load_pretrained(pretrained).model)
    with torch.device("meta"):
        head = HEADS[name](build_pretrained(source, dropout=0.1), len(CLASSES))
    if sharded:
        shard_over(head, init_device_mesh("cpu", (1,)))
    initialize(head, torch.device("cpu"), seed=0)
    drawn = {key: value.clone() for key, value in weights(head).items()}
    load_parts(source, head)
    for key, value in weights(head).items():
        assert torch.equal(value, trained.get(key, drawn[key])), key
    assert {key for key in drawn if key not in trained} >= {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_saved_classifier_opens_as_the_same_function(pretrained, tmp_path, name, sharded):
    source = find_pretrained(pretrained)
    with torch.device("meta"):
        head = HEADS[name](build_pretrained(source), len(CLASSES))
    if sharded:
        shard_over(head, init_device_mesh("cpu", (1,)))
    initialize(head, torch.device("cpu"), seed=1)
    description = describe_classifier(source.builder, source.arguments, source.crop, name, CLASSES)
    save_model(tmp_path / "model", head, description, source.tokenizer)
    save_checkpoint(tmp_path / "checkpoints", head, adamw(head), {"step": 1, "model": description})
    (tmp_path / "tokenizer.model").write_bytes(source.tokenizer.read_bytes())
    for path in (tmp_path, tmp_path / "checkpoints/step_1"):
        model, classes, tokenizer, image_size, crop = load_classifier(path)
        assert (classes, image_size, crop, model.training) == (CLASSES, 32, "center", False)
        ids = torch.tensor([tokenizer.encode("a cat"), tokenizer.encode("a dog is")])[:, :-1]
        torch.testing.assert_close(model(images(), ids), head.eval()(images(), ids))
        with pytest.raises(ValueError, match=f"load_weights: .* is a classifier, {name}, .* give the model that"):
            load_pretrained(path)


def test_a_model_without_a_head_is_no_classifier(pretrained):
    with pytest.raises(ValueError, match=r"load_classifier: .*model is a model without a head; train one on it with"):
        load_classifier(pretrained)


@pytest.mark.parametrize("change", [{"head": "mine"}, {"classes": None}, {"classes": [1, 2]}, {"classes": {"a": "b"}}])
def test_a_description_of_another_head_or_without_classes_is_refused(pretrained, tmp_path, change):
    source = find_pretrained(pretrained)
    with torch.device("meta"):
        head = HEADS["image_classifier"](build_pretrained(source), len(CLASSES))
    initialize(head, torch.device("cpu"), seed=1)
    described = describe_classifier(source.builder, source.arguments, source.crop, "image_classifier", CLASSES)
    save_model(tmp_path / "model", head, described | change, source.tokenizer)
    with pytest.raises(ValueError, match=r"load_classifier: .* must name a head, one of image_classifier, "):
        load_classifier(tmp_path)
