"""Whatever evaluates a model leaves each of its modules in the mode that it was in, also after an error."""

import pytest
import torch
from evaluate_worker import SEEN, Noise, a_model, colours, several_captions
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grr.data import Batch
from grr.data.collate import collate_captions
from grr.evaluation.classification import answers, classification_scores
from grr.evaluation.outputs import compute_outputs, features
from grr.evaluation.zero_shot import embed_texts
from grr.generation.generate import generate
from grr.models.builders import grr_coca_tiny
from grr.models.coca import evaluating
from grr.models.heads import image_text_classifier
from grr.training.step import evaluation_losses

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@given(data=st.data(), fails=st.booleans())
def test_each_module_keeps_a_mode_of_its_own(data, fails):
    model = grr_coca_tiny(vision_layers=1, text_layers=1, multimodal_layers=1)
    for module in model.modules():
        module.training = data.draw(st.booleans())
    before = modes(model)
    try:
        with evaluating(model):
            assert not any(modes(model).values())
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert modes(model) == before


def losses(model, tokenizer):
    ids = collate_captions([tokenizer.encode("a red fox"), tokenizer.encode("a blue owl number 3")])
    return evaluation_losses(model, [[Batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), *ids, ["", ""], 0)]])


EVALUATIONS = {
    "evaluation_losses": losses,
    "compute_outputs": lambda model, tokenizer: compute_outputs(
        model, Noise(several_captions(6)), tokenizer, CPU, **SEEN
    ),
    "features": lambda model, tokenizer: features(model, colours(6), CPU, **SEEN),
    "embed_texts": lambda model, tokenizer: embed_texts(model, tokenizer, ["a red fox"], CPU),
    "generate": lambda model, tokenizer: generate(model, torch.zeros(1, 3, 32, 32), tokenizer, max_new_tokens=2),
    "classification_scores": lambda model, tokenizer: classification_scores(model, colours(6), tokenizer, CPU, **SEEN),
    "answers": lambda model, tokenizer: answers(model, colours(6), tokenizer, CPU, **SEEN),
}


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_leaves_a_tower_that_is_not_trained_as_it_was(tokenizer, name, fails):
    model = a_model(tokenizer)
    if name in ("classification_scores", "answers"):
        model = image_text_classifier(model, 4)
    model.vision_encoder.eval()
    outputs = []

    def watch(module: nn.Module, inputs: tuple) -> None:
        outputs.append(any(modes(model).values()))
        if fails:
            raise ZeroDivisionError

    for module in (model.vision_encoder, model.text_decoder):
        module.register_forward_pre_hook(watch)
    before = modes(model)
    if fails:
        with pytest.raises(ZeroDivisionError):
            EVALUATIONS[name](model, tokenizer)
    else:
        EVALUATIONS[name](model, tokenizer)
    assert set(outputs) == {False}
    assert modes(model) == before
