"""The protocol of a logger, and what it gets: lines of numbers, pictures with captions, the config and the manifest."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from omegaconf import OmegaConf
from torch import Tensor

PROJECT = "grr"  # or experiment: where runs are listed, unless the environment variables of a logger name another

Picture = tuple[Tensor, str]  # uint8 [3, h, w], and the text below it


class Line(NamedTuple):
    """The numbers of a line of metrics.jsonl, by key, and the pictures of a validation."""

    split: str
    step: int
    numbers: dict[str, float]
    pictures: Sequence[Picture] = ()


class Logger(Protocol):
    """A run in a tool that draws curves. Methods may raise any Exception, after which they are called again later."""

    held: Mapping[str, int]  # at the time of opening, the last step of each split that the tool has

    def write(self, line: Line) -> None:
        """Add a line, which the tool does not have. Lines come in the order of the log."""
        ...

    def close(self, *, finished: bool) -> None:
        """End the run: it has finished, or was stopped and may be continued."""
        ...


def last_steps(rows: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Returns the last step of each split. rows: keys of the form split/name, each with a step."""
    last: dict[str, int] = {}
    for key, step in rows:
        split = key.partition("/")[0]
        last[split] = max(step, last.get(split, step))
    return last


def run_facts(folder: Path) -> dict[str, Any]:
    """Returns the sections of a run's config.yaml, and the last start in its manifest.json as `manifest`."""
    facts: dict[str, Any] = {}
    if (file := folder / "config.yaml").is_file():
        facts |= OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # type: ignore[arg-type]
    if (file := folder / "manifest.json").is_file():
        facts["manifest"] = json.loads(file.read_text())["starts"][-1]
    return facts


def run_files(folder: Path) -> list[Path]:
    """Returns those of config.yaml and manifest.json that are in the folder."""
    return [file for file in (folder / "config.yaml", folder / "manifest.json") if file.is_file()]
