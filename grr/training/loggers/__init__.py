"""Loggers: TensorBoard, Weights & Biases, trackio and MLflow receive the numbers, pictures and captions of a run.

The log of a run is metrics.jsonl; a logger gets copies of its lines, and can neither change nor end a run.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from grr.training.loggers import mlflow, tensorboard, trackio, wandb
from grr.training.loggers.logger import Line, Logger, Picture
from grr.training.loggers.run_ids import forget_run_ids
from grr.training.loggers.sender import Sender

__all__ = ["Line", "Logger", "LoggerName", "Picture", "Sender", "check_loggers", "open_senders"]

LoggerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]  # each also the name of an extra
OPEN: dict[str, Callable[[Path, int], Logger]] = {  # folder, step -> logger
    "tensorboard": tensorboard.open_tensorboard,
    "wandb": wandb.open_wandb,
    "trackio": trackio.open_trackio,
    "mlflow": mlflow.open_mlflow,
}
PACKAGES = {name: (name,) for name in get_args(LoggerName)} | {"mlflow": ("mlflow", "sqlalchemy", "alembic")}


def check_loggers(names: Sequence[str]) -> None:
    """Raise ImportError for a logger whose packages are not installed, and ValueError for one that is named twice."""
    for name in names:
        missing = [package for package in PACKAGES[name] if not _is_installed(package)]
        if missing:
            raise ImportError(
                f"check_loggers: run.loggers names {name}, whose package {missing[0]} is not installed; "
                f'pip install "grr-coca[{name}]"'
            )
    if len(set(names)) < len(names):
        raise ValueError(f"check_loggers: run.loggers must name each logger once, got {', '.join(names)}")


def open_senders(names: Sequence[str], folder: Path, *, step: int, lines: Sequence[Line]) -> list[Sender]:
    """Returns a sender for each logger of a run that goes on after `step` and has these lines in its log so far.

    A run without a line begins anew, as another run of each logger.
    """
    if step <= 0 and not lines:
        forget_run_ids(folder)
    return [Sender(name, partial(OPEN[name], folder, step), lines) for name in names]


def _is_installed(package: str) -> bool:
    """Whether a package can be imported: a folder of its name in the working directory, such as wandb/, is not it."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
