"""Log of a run: metrics.jsonl, a line at a time, and manifest.json, what it was computed on."""

import json
import logging
import math
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import grr
from grr import config
from grr.files.atomic import write_atomic
from grr.parallel.device import default_device, device_name
from grr.parallel.process_group import is_rank_0, on_rank_0
from grr.training.loggers import Line, Picture, Sender, open_senders
from grr.training.step import Losses

logger = logging.getLogger(__name__)

LogLine = dict[str, Any]  # a line of metrics.jsonl


class MetricsLog:
    """Append JSON objects to folder/metrics.jsonl, one a line, and send their numbers to loggers; on rank 0 alone.

    Opened for a run that resumes after `step`, it first removes later lines, a line that a kill cut, and the line
    "final", which will be computed again. steps_per_epoch: each line then has its `epoch`. loggers: names of
    `LoggerName`; a logger first gets those lines of the file that it lacks, and never a line twice.
    """

    def __init__(
        self, folder: Path, *, step: int = 0, steps_per_epoch: int | None = None, loggers: Sequence[str] = ()
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._file: IO[str] | None = None
        self._senders: list[Sender] = []
        if is_rank_0():
            kept = [line for line in read_metrics(folder) if line["step"] <= step and line.get("split") != "final"]
            write_atomic(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
            self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._senders = open_senders(loggers, folder, step=step, lines=[_line(line) for line in kept])

    def write(self, split: str, step: int, pictures: Sequence[Picture] = (), /, **values: Any) -> None:
        """Write one line; on other ranks than 0, do nothing. JSON has no NaN: such numbers become null.

        pictures: with their captions, which loggers alone receive.
        """
        if self._file is None:
            return
        epoch = {"epoch": step / self._steps_per_epoch} if self._steps_per_epoch else {}
        line = {"split": split, "step": step, **epoch, **values}
        finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for sender in self._senders:
            sender.send(_line(finite, pictures))

    def close(self) -> None:
        """End a run that has finished; the loggers of a run that ends without it record that it was stopped."""
        if self._file is not None:
            self._file.close()
        for sender in self._senders:
            sender.close(finished=True)


def open_log(
    folder: Path,
    cfg: config.Config,
    facts: dict[str, Any],
    *,
    step: int,
    loggers: Sequence[str],
    changes: Mapping[str, Any] | None = None,
) -> MetricsLog:
    """Write config.yaml and manifest.json (this start, with `facts`), then open metrics.jsonl; on rank 0 alone.

    facts: what the run computes on; its steps_per_epoch gives each line of the log an epoch. changes: of the identity,
    accepted at resume, which become a line of their own.
    """

    def write_start() -> None:
        if step <= 0 and (lines := len(read_metrics(folder))):
            logger.warning(
                "%s has no checkpoint: the run starts at step 0 and replaces its log of %d lines", folder, lines
            )
        write_atomic(folder / "config.yaml", config.to_yaml(cfg))
        write_manifest(folder, step=step, world_size=dist.get_world_size(), batch_size=cfg.run["batch_size"], **facts)

    on_rank_0(write_start)
    log = MetricsLog(folder, step=step, steps_per_epoch=facts["steps_per_epoch"], loggers=loggers)
    if changes:
        log.write("change", step, changes=changes)
    return log


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Returns the number of parameters, and of those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"parameters": sum(n for n, _ in sizes), "trained_parameters": sum(n for n, trained in sizes if trained)}


def summary(step: int, losses: Losses, found: dict[str, float]) -> str:
    """Returns a validation as one line of text."""
    return (
        f"step {step}: validation loss {losses.loss:.4f} ({losses.contrastive_weight:g} x contrastive + "
        f"{losses.captioning_weight:g} x captioning), perplexity {losses.perplexity:.4f}, contrastive loss "
        f"{losses.contrastive_loss:.4f} among {losses.contrastive_batch} pairs; among {found['num_eval_images']} "
        f"images R@1 {found['image_to_text_r1']:.1%} image to text, {found['text_to_image_r1']:.1%} text to image; "
        f"{found['caption_exact']:.1%} of captions exact"
    )


def has_ended(folder: Path, **end: Any) -> bool:
    """Returns whether a run has saved its model and then logged the line "final" with these values."""
    finals = [line for line in read_metrics(folder) if line.get("split") == "final"]
    return (folder / "model").is_dir() and any(end.items() <= line.items() for line in finals)


def is_number(value: object) -> bool:
    """Returns whether a value of the log is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def kept_step(row: LogLine) -> int | None:
    """Returns the step of the weights that a run keeps, by its final line or a validation's, or None."""
    step = row.get("model_step", row.get("best_step", -1))
    return step if isinstance(step, int) and step >= 0 else None


def read_metrics(folder: Path) -> list[LogLine]:
    """Returns the whole lines of folder/metrics.jsonl; an empty list if there is no file."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def write_manifest(folder: Path, **facts: Any) -> None:
    """Add this start of the run to those in folder/manifest.json: versions, machine, command, and facts."""
    file = folder / "manifest.json"
    starts = read_starts(folder)
    device = default_device()
    starts.append(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "versions": {
                "grr": grr.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "commit": _commit(),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "device": device_name(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""),
            **facts,
        }
    )
    write_atomic(file, json.dumps({"starts": starts}, indent=2) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Returns the starts of a run from its manifest.json; an empty list if there is no such file."""
    try:
        return list(json.loads((folder / "manifest.json").read_text())["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _line(line: LogLine, pictures: Sequence[Picture] = ()) -> Line:
    """The numbers of a line of the log, for loggers."""
    numbers = {key: value for key, value in line.items() if key not in ("split", "step") and is_number(value)}
    return Line(str(line.get("split")), line["step"], numbers, pictures)


def _commit() -> str | None:
    """Returns the git commit of the checkout that grr is imported from; None if it is not a checkout."""
    here = Path(grr.__file__).resolve().parent
    words = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
