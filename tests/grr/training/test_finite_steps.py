"""The check that losses and gradients are finite: it finds the first bad step, late, and names its pairs."""

import json

import pytest
import torch

from grr.data import Batch
from grr.data.collate import CaptionBatch
from grr.training.finite import MOST, FiniteCheck
from grr.training.step import Losses, StepLosses

pytestmark = pytest.mark.usefixtures("process_group")
GOOD, BAD = torch.tensor(2.125), torch.tensor(torch.nan)


def batch(name: str) -> Batch:
    captions = CaptionBatch(*[torch.zeros(1, dtype=torch.int64)] * 5, 1)
    return Batch(torch.zeros(1), *captions, names=[name], replaced=0)


def losses(contrastive: torch.Tensor, captioning: torch.Tensor = GOOD) -> StepLosses:
    return StepLosses(contrastive, captioning, 8, 2.0, 1.0)


def test_a_step_that_is_not_finite_is_reported_by_its_number_and_its_pairs(tmp_path):
    finite = FiniteCheck(tmp_path)
    finite.record(6, losses(GOOD), torch.tensor(3.0), [batch("a dog.png")])
    finite.record(7, losses(BAD), torch.tensor(torch.inf), [batch("a fox.png")])
    finite.record(8, losses(BAD, BAD), BAD, [batch("an owl.png")])  # the weights of step 7 spoil all later ones
    with pytest.raises(FloatingPointError) as refused:
        finite.check()
    assert str(refused.value).startswith(
        "check_finite: the loss and its gradient must be finite, got contrastive loss nan, captioning loss 2.125, "
        "gradient norm inf at step 7, in the batch of a fox.png (all its names are in "
    )
    written = json.loads((tmp_path / "non_finite_step_7.json").read_text(), parse_constant=pytest.fail)
    assert written["names"] == [[["a fox.png"]]]
    assert (written["contrastive_loss"], written["captioning_loss"], written["gradient_norm"]) == (None, 2.125, None)


def test_finite_steps_pass_and_are_checked_once(tmp_path):
    finite = FiniteCheck(tmp_path)
    finite.check()
    for step in range(3):
        finite.record(step, losses(GOOD), GOOD, [batch("a dog.png")])
        finite.check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("norm", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_found_under_a_finite_loss(tmp_path, norm):
    finite = FiniteCheck(tmp_path)
    finite.record(0, losses(GOOD), torch.tensor(norm), [batch("a dog.png")])
    with pytest.raises(FloatingPointError, match="gradient norm"):
        finite.check()


def test_many_steps_are_checked_without_a_call(tmp_path):
    finite = FiniteCheck(tmp_path)
    finite.record(0, losses(BAD), GOOD, [batch("a fox.png")])
    for step in range(1, MOST - 1):
        finite.record(step, losses(GOOD), GOOD, [batch("a dog.png")])
    with pytest.raises(FloatingPointError, match="at step 0"):
        finite.record(MOST - 1, losses(GOOD), GOOD, [batch("a dog.png")])


def test_a_validation_that_is_not_finite_is_refused(tmp_path):
    finite = FiniteCheck(tmp_path)
    finite.check_validation(9, Losses(1.0, 0.5, 0.0, 8, 2.0, 1.0))
    with pytest.raises(FloatingPointError, match="got loss nan, contrastive loss nan, captioning loss 0 at step 9"):
        finite.check_validation(9, Losses(torch.nan, torch.nan, 0.0, 8, 2.0, 1.0))
