"""The ids that a run has in its loggers: loggers.json in its folder, so that a resumed run is the same run there."""

import json
from pathlib import Path

from grr.files.atomic import write_atomic


def read_run_id(folder: Path, logger: str) -> str | None:
    """Returns the id of the run in a logger; None if it has none yet."""
    return _read(folder).get(logger)


def write_run_id(folder: Path, logger: str, run_id: str) -> None:
    write_atomic(folder / "loggers.json", json.dumps(_read(folder) | {logger: run_id}, indent=2) + "\n")


def forget_run_ids(folder: Path) -> None:
    (folder / "loggers.json").unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / "loggers.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
