"""The folders of a run's checkpoints: step_N, and what a kill left as step_N.tmp or step_N.old."""

import logging
import re
import shutil
from pathlib import Path

from grr.checkpoint.manifest import find_fault
from grr.files.atomic import fsync
from grr.parallel.process_group import on_rank_0

logger = logging.getLogger(__name__)


def has_checkpoints(folder: Path) -> bool:
    """Returns whether a folder has checkpoints, whole or damaged, so that a run that writes there resumes."""
    return any(_checkpoints(folder))


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the whole checkpoint of the highest step in folder; None if none was ever whole. Changes nothing on disk.

    Whole means that every file has the size and SHA-256 of manifest.json. A damaged one is logged and skipped.
    Raises ValueError naming the faults if there are checkpoints and every one is damaged, so that a run never begins
    again at step 0 over its own log. A `.tmp` that a killed run left unfinished is not damage.
    """

    def find() -> Path | None:
        faults: list[str] = []
        for path in sorted(_checkpoints(folder), key=_rank_of_name, reverse=True):
            fault = find_fault(path)
            if fault is None:
                for fault in faults:
                    logger.warning(
                        "latest_checkpoint: %s; %s is used instead (restore the file, or delete the folder)",
                        fault,
                        path,
                    )
                return path
            if path.suffix not in (".tmp", ".old"):
                faults.append(fault)
        if faults:
            raise ValueError(
                f"latest_checkpoint: every checkpoint in {folder} is damaged: {'; '.join(faults)}; restore these "
                f"files, set run.folder to a new folder, or delete {folder} to begin again at step 0"
            )
        return None

    return on_rank_0(find)


def check_checkpoint(path: Path) -> None:
    """Raise ValueError naming the fault and its remedy if a checkpoint is missing or damaged."""
    if fault := on_rank_0(lambda: find_fault(path)):
        raise ValueError(
            f"check_checkpoint: {fault}; restore the file from a copy, or fine-tune one of the checkpoints in "
            f"{path.parent.parent / 'checkpoints'} (model.path) in a new run.folder"
        )


def adopt_checkpoint(path: Path) -> Path:
    """Rename a whole checkpoint that a kill left as step_N.tmp or step_N.old to step_N; returns its path.

    A damaged folder of that name is removed.
    """
    if not path.suffix:
        return path
    named = path.with_suffix("")

    def rename() -> None:
        if named.exists():
            shutil.rmtree(named)
        path.rename(named)
        fsync(named.parent)

    on_rank_0(rename)
    return named


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left of checkpoints that were being written (.tmp) or removed (.old)."""
    on_rank_0(lambda: _remove_leftovers(folder))


def remove_checkpoints_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run that continues from `step` writes again."""

    def remove() -> None:
        for path in _checkpoints(folder):
            if _rank_of_name(path)[0] > step:
                shutil.rmtree(path)

    on_rank_0(remove)


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in folder, those that were being written (.tmp) or removed (.old) included."""
    return [
        path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+(\.tmp|\.old)?", path.name) and path.is_dir()
    ]


def _rank_of_name(path: Path) -> tuple[int, int]:
    return int(path.stem.removeprefix("step_")), [".old", ".tmp", ""].index(path.suffix)


def _remove_leftovers(folder: Path) -> None:
    for path in _checkpoints(folder):
        if path.suffix:
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove what killed runs left, and all but the `keep` newest checkpoints up to step. Called by rank 0 alone."""
    _remove_leftovers(folder)
    paths = sorted(_checkpoints(folder), key=_rank_of_name, reverse=True)
    whole = [path for path in paths if _rank_of_name(path)[0] <= step]
    for path in whole[keep:]:
        shutil.rmtree(path.rename(path.with_suffix(".old")), ignore_errors=True)
