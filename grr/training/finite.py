"""The check that losses and gradients of a run are finite, without a wait in every step."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grr.data import Batch
from grr.parallel.process_group import sum_over_processes

MOST = 64  # steps that are recorded before they are checked in any case


class _Step(NamedTuple):
    step: int
    values: dict[str, Tensor]  # scalars on the device, by name
    names: list[list[str]]  # of the pairs, by micro-batch


class FiniteCheck:
    """Check that the losses and the gradient norm of every step are finite before a checkpoint holds its result.

        finite = FiniteCheck(folder)
        while step < last:
            ...                                  # losses and gradients
            finite.record(step, losses, norm, batches)
            if due:
                finite.check()                   # waits for the device
                save(step)
            optimizer.step()

    Call `check` before weights are saved or validated, and where a line is logged: there the host waits for the device
    in any case. All processes call both alike.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._steps: list[_Step] = []

    def record(self, step: int, losses: NamedTuple, norm: Tensor, batches: Sequence[Batch]) -> None:
        """Keep the values of a step on the device, and the names of its pairs, until the next check.

        losses: its fields that are tensors are the parts of this process, whose sum over processes is finite if each
        part is; norm: of the gradient, equal in all processes.
        """
        values = {name.replace("_", " "): x for name, x in losses._asdict().items() if isinstance(x, Tensor)}
        values["gradient norm"] = norm / dist.get_world_size()
        names = [batch.names for batch in batches]
        self._steps.append(_Step(step, {name: x.detach() for name, x in values.items()}, names))
        if len(self._steps) >= MOST:
            self.check()

    def check(self) -> None:
        """Check all steps since the last call.

        Raises FloatingPointError in all processes if a value of one of them is not finite, and writes the names of its
        pairs to folder/non_finite_step_N.json, in which a number that is not finite is null.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        rows = torch.stack([torch.stack([x.float() for x in s.values.values()]) for s in steps])
        for s, row in zip(steps, sum_over_processes(rows).tolist(), strict=True):
            if not all(map(math.isfinite, row)):
                self._stop(s, dict(zip(s.values, row, strict=True)))

    def check_validation(self, step: int, losses: NamedTuple) -> None:
        """Check the losses of a validation, numbers that are equal in all processes; raises as `check` does."""
        numbers = {name.replace("_", " "): x for name, x in losses._asdict().items() if name.endswith("loss")}
        if not all(map(math.isfinite, numbers.values())):
            self._stop(_Step(step, {}, []), numbers)

    def _stop(self, s: _Step, numbers: dict[str, float]) -> None:
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, s.names)
        file = self._folder / f"non_finite_step_{s.step}.json"
        if dist.get_rank() == 0:
            kept = {key.replace(" ", "_"): x if math.isfinite(x) else None for key, x in numbers.items()}
            file.write_text(json.dumps({"step": s.step, **kept, "names": names}, allow_nan=False))
        advice = (
            "Check those pairs, or lower optimizer.lr or raise schedule.warmup_steps, and submit the same command again"
        )
        if (self._folder / "checkpoints").is_dir():
            advice += (
                ": the run continues from the last checkpoint, and prints the option that accepts the change. If this "
                "is the first step after a resume, delete the newest folder in "
                f"{self._folder / 'checkpoints'} to continue from the one before"
            )
        got = ", ".join(f"{name} {x:.4g}" for name, x in numbers.items())
        pairs = f", in the batch of {s.names[0][0]} (all its names are in {file})" if s.names else ""
        raise FloatingPointError(
            f"check_finite: the loss and its gradient must be finite, got {got} at step {s.step}{pairs}; no checkpoint "
            f"holds weights of that step or a later one. {advice}"
        )
