"""A classifier is saved, opened as the same function, and begins with the parts of a trained CoCa."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from grr.checkpoint.model_folder import save_model
from grr.checkpoint.training_state import save_checkpoint
from grr.inference.classifiers import describe_classifier, load_classifier, load_parts
from grr.inference.pretrained import build_pretrained, describe, find_pretrained, load_pretrained
from grr.models.builders import grr_coca_tiny
from grr.models.heads import HEADS
from grr.parallel.initialize import initialize
from grr.parallel.shard import shard_over
from grr.tokenizers import train_tokenizer
from grr.training.optim import adamw

pytestmark = pytest.mark.usefixtures("process_group")

CLASSES = ["cat", "dog", "eel"]


def images(b: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (b, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def filled(name: str, *, sharded: bool, seed: int = 0) -> nn.Module:
    with torch.device("meta"):
        head = HEADS[name](grr_coca_tiny(), len(CLASSES))
    if sharded:
        shard_over(head, init_device_mesh("cpu", (1,)))
    initialize(head, torch.device("cpu"), seed=seed)
    return head


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}


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
