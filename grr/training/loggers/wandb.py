"""Weights & Biases: an offline run in the run's folder, unless WANDB_MODE says otherwise."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from grr.training.loggers.logger import PROJECT, Line, run_facts, run_files
from grr.training.loggers.run_ids import read_run_id, write_run_id


class WandB:
    """A run of Weights & Biases, which counts rows itself; curves are drawn over the key "step".

    run: of wandb.init. held: the last step of each split. row: the number of the next row.
    """

    def __init__(self, run: Any, held: Mapping[str, int], row: int) -> None:
        self.held, self._run, self._row = held, run, row

    def write(self, line: Line) -> None:
        import wandb

        values: dict[str, Any] = {f"{line.split}/{key}": value for key, value in line.numbers.items()}
        if line.pictures:
            images = _of_one_size([image for image, _ in line.pictures])
            values[f"{line.split}/pictures"] = [
                wandb.Image(image.permute(1, 2, 0).cpu().numpy(), caption=text)
                for image, (_, text) in zip(images, line.pictures, strict=True)
            ]
        values |= {"step": line.step, f"{line.split}/step": line.step}  # the second remains in the summary
        self._run.log(values, step=self._row, commit=True)
        self._row += 1

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def open_wandb(folder: Path, step: int) -> WandB:
    """Begin or continue the run; a process offline has a folder of its own, which `wandb sync` adds to the others."""
    os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # seconds that a kill loses, instead of 15
    import wandb

    run_id = read_run_id(folder, "wandb") or secrets.token_hex(4)
    write_run_id(folder, "wandb", run_id)
    run = wandb.init(
        id=run_id,
        resume="allow",
        name=_unless("WANDB_NAME", folder.resolve().name),
        project=_unless("WANDB_PROJECT", PROJECT),
        dir=_unless("WANDB_DIR", str(folder)),
        mode=_unless("WANDB_MODE", "offline"),
        config=run_facts(folder),
        settings=wandb.Settings(console="off"),
    )
    run.define_metric("*", step_metric="step")
    for file in run_files(folder):
        run.save(str(file), base_path=str(folder), policy="now")
    summary = _local_summary(Path(run.settings.wandb_dir), run_id, run.dir) if run.offline else dict(run.summary)
    held = {
        key.removesuffix("/step"): int(value)
        for key, value in summary.items()
        if key.endswith("/step") and isinstance(value, int | float)
    }
    return WandB(run, held, max(run.step, summary.get("_step", -1) + 1))


def _of_one_size(images: Sequence[Tensor]) -> list[Tensor]:
    """uint8 [3, h, w] each -> images of the largest height and width, black to the right and below, as wandb wants."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]


def _unless(variable: str, value: Any) -> Any:
    """The value, or None, from which wandb reads the variable, where the environment has it."""
    return None if os.environ.get(variable) else value


def _local_summary(wandb_dir: Path, run_id: str, current: str) -> dict[str, Any]:
    """The last values of each key in the files that earlier processes of an offline run have left."""
    summary: dict[str, Any] = {}
    for file in sorted(wandb_dir.glob(f"*run-*-{run_id}/run-{run_id}.wandb")):
        if file.parent != Path(current).parent:
            words = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--summary", "--json"]
            read = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
            )
            summary |= json.loads(read.stdout)["summary"]
    return summary
