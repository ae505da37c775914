"""Soft reset: when fine-tuning lowers its learning rate and returns to its best weights, and when it stops."""

import math
from typing import Literal, NamedTuple

Decision = Literal["improved", "continue", "reset", "stop"]


class SoftReset(NamedTuple):
    """State of the soft reset after a validation, in plain values, so that a checkpoint stores it as JSON."""

    step: int = -1  # of the last validation; -1 before the first
    decision: Decision = "continue"  # of the last validation
    regime: int = 1  # learning-rate regime, counted from 1
    divisor: float = 1.0  # of peak and minimum learning rate in this regime
    stale: int = 0  # validations since the regime began or last improved the best loss
    best_loss: float | None = None
    best_step: int = -1  # of the best loss


def soft_reset(
    state: SoftReset, step: int, loss: float, *, patience: int = 3, regimes: int = 3, factor: float = 100.0
) -> SoftReset:
    """Returns the state after a validation at `step` optimizer steps; its `decision` says what the caller must do:

    - improved: save these weights; the loss is below all before it
    - continue: train on
    - reset: the last `patience` validations of this regime did not improve the best loss; load the weights of
      `best_step`, divide peak and minimum learning rate by `factor`, and train on from there
    - stop: the same condition in the last of `regimes` regimes; end the run

    The first loss is that of the initial weights. An improvement restarts the count of the patience, but never raises
    the learning rate. A run therefore ends after patience * regimes validations without improvement, 9 by default. A
    loss that is NaN is not an improvement. Source: GRR-CoCa, section 3.3.
    Raises ValueError if an argument is out of range, or the first loss is not finite.
    """
    if patience < 1 or regimes < 1 or not factor >= 1:
        raise ValueError(
            f"soft_reset: patience, regimes and factor must be at least 1, got {patience=}, {regimes=}, {factor=}"
        )
    assert state.decision != "stop", "the run has ended"
    if state.best_loss is None and not math.isfinite(loss):
        raise ValueError(
            f"soft_reset: the loss must be finite before fine-tuning, got {loss}; check the weights in model.path"
        )
    state = state._replace(step=step)
    if state.best_loss is None or loss < state.best_loss:
        return state._replace(decision="improved", stale=0, best_loss=loss, best_step=step)
    if state.stale + 1 < patience:
        return state._replace(decision="continue", stale=state.stale + 1)
    if state.regime < regimes:
        return state._replace(decision="reset", regime=state.regime + 1, divisor=state.divisor * factor, stale=0)
    return state._replace(decision="stop", stale=patience)


def describe_decision(state: SoftReset) -> str:
    """Returns a clause about the decision, for the terminal."""
    best = f"the best, {state.best_loss:.4f}, was after step {state.best_step}"
    return {
        "improved": "the best so far",
        "continue": f"{best}; validations without improvement: {state.stale}",
        "reset": f"{best}: reset to it, with the learning rate divided by {state.divisor:g}",
        "stop": f"{best}: stop after the last learning-rate regime",
    }[state.decision]
