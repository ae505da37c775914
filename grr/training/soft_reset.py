"""When a fine-tuning lowers its learning rate and goes back to its best weights, and when it stops."""

import math
from typing import Literal, NamedTuple

Decision = Literal["improved", "continue", "reset", "stop"]


class SoftReset(NamedTuple):
    """Where the control of a run stands after a validation: plain values, so that a checkpoint holds them as JSON."""

    step: int = -1  # of the last validation, -1 before the first
    decision: Decision = "continue"  # that it led to
    regime: int = 1  # of learning rates, counted from 1
    divisor: float = 1.0  # of both ends of the learning rate in this regime
    stale: int = 0  # validations of this regime since it began, or since it last improved the best loss
    best_loss: float | None = None
    best_step: int = -1  # of the best loss


def soft_reset(
    state: SoftReset, step: int, loss: float, *, patience: int = 3, regimes: int = 3, factor: float = 100.0
) -> SoftReset:
    """Judge a validation after `step` optimizer steps. What to do next is the `decision` of the new state:

    - improved: keep these weights, the loss is below all before it
    - continue: go on
    - reset: this regime's last `patience` validations brought no improvement; go back to the weights of `best_step`,
      divide both ends of the learning rate by `factor`, and train on from there
    - stop: the same, but of the last of `regimes` regimes

    The first loss is that of the start. An improvement gives a regime its whole patience again, but the learning rate
    never rises. So a run ends after patience * regimes validations without improvement, 9 by default, that ended a
    regime each patience of them, and it has at most `regimes` regimes. A loss that is no number improves nothing.
    Source: GRR-CoCa, section 3.3. Raises ValueError if an argument is out of range, or the first loss is not finite.
    """
    if patience < 1 or regimes < 1 or not factor >= 1:
        raise ValueError(
            f"soft_reset: patience, regimes and factor must be at least 1, got {patience=}, {regimes=}, {factor=}"
        )
    assert state.decision != "stop", "the run has ended"
    if state.best_loss is None and not math.isfinite(loss):
        raise ValueError(
            f"soft_reset: the loss must be finite where a fine-tuning starts, got {loss}; are the weights "
            "of model.path whole?"
        )
    state = state._replace(step=step)
    if state.best_loss is None or loss < state.best_loss:
        return state._replace(decision="improved", stale=0, best_loss=loss, best_step=step)
    if state.stale + 1 < patience:
        return state._replace(decision="continue", stale=state.stale + 1)
    if state.regime < regimes:
        return state._replace(decision="reset", regime=state.regime + 1, divisor=state.divisor * factor, stale=0)
    return state._replace(decision="stop", stale=patience)


def in_words(state: SoftReset) -> str:
    """The decision as a clause for people."""
    best = f"the best, {state.best_loss:.4f}, was after step {state.best_step}"
    return {
        "improved": "the best so far",
        "continue": f"{best}; validations without improvement: {state.stale}",
        "reset": f"{best}: back to it, with both ends of the learning rate divided by {state.divisor:g}",
        "stop": f"{best}: that was the last learning rate to try",
    }[state.decision]
