"""When a training run resumes, saves and stops."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from grr.checkpoint.identity import check_identity
from grr.checkpoint.step_folders import (
    adopt_checkpoint,
    check_checkpoint,
    latest_checkpoint,
    remove_checkpoints_after,
    remove_leftovers,
)
from grr.checkpoint.stop_signal import StopSignal
from grr.checkpoint.training_state import load_checkpoint, read_progress, save_checkpoint
from grr.parallel.process_group import DelayedMax

logger = logging.getLogger(__name__)


class Saver:
    """Write and read the checkpoints of a run: folder/checkpoints/step_N, and folder/best/step_N.

        saver = Saver(folder, model, optimizer, identity=run_identity(...), description=describe(...), **cfg.saving)
        progress = saver.resume()
        while step < last:
            ...                                  # losses and gradients
            if saver.due:
                finite.check()                   # finite gradients show that the weights of `step` are finite
                saver.save(step)
            if saver.stopping:
                break
            optimizer.step()
            step += 1
            saver.poll(step)

    A checkpoint of step N is due after step N, and is written when the gradients of step N + 1 are finite, so that
    weights which the next step finds not to be finite never become a checkpoint.

    ema: the weights of a `grr.training.ema.EMA`. identity: `run_identity`. description: `describe` of
    grr.inference.pretrained, so that a checkpoint can be opened as a model. Called by all ranks alike.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: Optimizer,
        ema: Mapping[str, Tensor] | None = None,
        *,
        identity: Mapping[str, Any],
        description: Mapping[str, Any],
        every: int = 1000,  # optimizer steps from one checkpoint to the next, at most
        minutes: float = 30.0,  # from one checkpoint to the next, at most
        keep: int = 2,  # checkpoints, beside the best
        accept_changes: tuple[str, ...] = (),  # keys of the config that a resumed run may change
    ) -> None:
        self._folder, self._model, self._optimizer, self._ema = folder, model, optimizer, ema
        self._identity, self._description, self._accepted = dict(identity), dict(description), accept_changes
        self._every, self._minutes, self._keep = every, minutes, keep
        self._stop, self._largest, self._saved = StopSignal(), DelayedMax(), time.monotonic()
        self.due = False
        self.stopping = 0  # the exit status of a run that was asked to stop, else 0
        self.changes: dict[str, list[Any]] = {}  # accepted at resume: [value before, value now] by key

    def resume(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint and return its progress; None if there is none to resume.

        Raises ValueError if the identity differs in more than accept_changes, or if every checkpoint is damaged.
        """
        checkpoint = latest_checkpoint(self._folder / "checkpoints")
        if checkpoint is None:
            return None
        saved = read_progress(checkpoint)["identity"]
        self.changes = check_identity(self._folder, saved, self._identity, accepted=self._accepted)
        checkpoint = adopt_checkpoint(checkpoint)
        remove_leftovers(self._folder / "checkpoints")
        configured = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        progress = load_checkpoint(checkpoint, self._model, self._optimizer, self._ema)
        for group, options in zip(self._optimizer.param_groups, configured, strict=True):
            group.update(options)  # those of the config, which differ from the checkpoint's only where accepted
        logger.info("resuming %s after step %d", self._folder, progress["step"])
        return progress

    def resume_best(self, step: int) -> None:
        """Remove checkpoints in best/ of later steps than the best one so far.

        Raises ValueError if the checkpoint of that step is damaged.
        """
        remove_checkpoints_after(self._folder / "best", step)
        remove_leftovers(self._folder / "best")
        if step >= 0:
            check_checkpoint(self.best(step))

    def best(self, step: int) -> Path:
        """Returns the folder of the best weights, which are those of a step."""
        return self._folder / "best" / f"step_{step}"

    def poll(self, step: int, *, due: bool = False) -> None:
        """Decide on all ranks, after an optimizer step, whether to save and whether to stop; due: save in any case.

        With several processes, a signal or the time of one of them is known to all a step later: none waits for it.
        """
        late = time.monotonic() - self._saved > 60 * self._minutes
        status = self._largest(2 * self._stop.status + late)
        self.stopping = status // 2
        self.due = self.due or due or status > 0 or step % self._every == 0

    def save(self, step: int, **progress: Any) -> None:
        """Write checkpoints/step_N with the progress of the run, JSON values by name."""
        self._write("checkpoints", step, progress, self._keep)
        self.due, self._saved = False, time.monotonic()

    def save_best(self, step: int, **progress: Any) -> None:
        """Write best/step_N. Call it before `save`, whose checkpoint names this step."""
        self._write("best", step, progress, max(2, self._keep))

    def _write(self, name: str, step: int, progress: Mapping[str, Any], keep: int) -> None:
        state = {"step": step, "identity": self._identity, "model": self._description, **progress}
        save_checkpoint(self._folder / name, self._model, self._optimizer, state, self._ema, keep=keep)
