"""What a run writes down: its numbers, a line at a time, and on what they were computed."""

import json
import logging
import math
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grr
from grr import config
from grr.training.step import Losses

logger = logging.getLogger(__name__)

LogLine = dict[str, Any]  # a line of metrics.jsonl


class MetricsLog:
    """Append JSON objects to folder/metrics.jsonl, one a line, and to TensorBoard's events if asked.

    Opened for a run that resumes after `step`, it first drops later lines and the one of its end ("final"), which will
    be computed again, and a line that a kill left unfinished. Raises ImportError if TensorBoard is wanted and not
    installed.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = False) -> None:
        file = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step and line.get("split") != "final"]
        _replace(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = file.open("a", encoding="utf-8")
        self._events: Any = _summary_writer(folder, step) if tensorboard else None

    def write(self, **values: Any) -> None:
        """Write one line; it must hold `split` and `step`. JSON has no NaN: such numbers become null."""
        finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in values.items():
                if isinstance(value, int | float) and key != "step":
                    self._events.add_scalar(f"{values['split']}/{key}", value, values["step"])

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def open_log(folder: Path, cfg: config.Config, facts: dict[str, Any], *, step: int, tensorboard: bool) -> MetricsLog:
    """Write down what runs (config.yaml), on what (manifest.json); then open the file of its numbers."""
    if step <= 0 and (lines := len(read_metrics(folder))):
        logger.warning("%s holds no checkpoint: the run begins at step 0, and its log of %d lines anew", folder, lines)
    config.save(cfg, folder / "config.yaml")
    write_manifest(folder, step=step, **facts)
    return MetricsLog(folder, step=step, tensorboard=tensorboard)


def summary(step: int, losses: Losses, found: dict[str, float]) -> str:
    """A validation in one sentence."""
    return (
        f"step {step}: validation loss {losses.loss:.4f} ({losses.contrastive_weight:g} x contrastive + "
        f"{losses.captioning_weight:g} x captioning), perplexity {losses.perplexity:.4f}, contrastive loss "
        f"{losses.contrastive_loss:.4f} among {losses.contrastive_batch} pairs; among {found['num_eval_images']} "
        f"images R@1 {found['image_to_text_r1']:.1%} image to text, {found['text_to_image_r1']:.1%} text to image; "
        f"{found['caption_exact']:.1%} of captions exact"
    )


def has_ended(folder: Path, **end: Any) -> bool:
    """Whether a run has left its model, and then the line "final" that says so, with these values."""
    finals = [line for line in read_metrics(folder) if line.get("split") == "final"]
    return (folder / "model").is_dir() and any(end.items() <= line.items() for line in finals)


def is_number(value: object) -> bool:
    """Returns whether a value of the log is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def kept_step(row: LogLine) -> int | None:
    """The step of the weights that a run keeps, by a line of its log: the final one, or a validation."""
    step = row.get("model_step", row.get("best_step", -1))
    return step if isinstance(step, int) and step >= 0 else None


def read_metrics(folder: Path) -> list[LogLine]:
    """The lines of folder/metrics.jsonl, without one that is torn; none if there is no file."""
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
    cuda = torch.cuda.is_available()
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
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
            **facts,
        }
    )
    _replace(file, json.dumps({"starts": starts}, indent=2) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of the run in folder, as `write_manifest` wrote them; none if there is no such file."""
    try:
        return list(json.loads((folder / "manifest.json").read_text())["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('MetricsLog: TensorBoard is not installed; pip install "grr-coca[tensorboard]"') from error
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def _commit() -> str | None:
    """The commit of the checkout that grr is imported from, if it is one."""
    here = Path(grr.__file__).resolve().parent
    words = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
