"""trackio: a database in the run's folder, unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say otherwise."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grr.training.loggers.logger import PROJECT, Line, last_steps, run_facts
from grr.training.loggers.run_ids import read_run_id, write_run_id


class Trackio:
    """A run of trackio. run: of trackio.init. held: the last step of each split."""

    def __init__(self, run: Any, held: Mapping[str, int]) -> None:
        self.held, self._run = held, run

    def write(self, line: Line) -> None:
        import trackio

        values: dict[str, Any] = {f"{line.split}/{key}": value for key, value in line.numbers.items()}
        for i, (image, text) in enumerate(line.pictures):
            array = image.permute(1, 2, 0).cpu().numpy()
            values[f"{line.split}/pictures/{i:02d}"] = trackio.Image(array, caption=text)
        self._run.log(values, step=line.step)

    def close(self, *, finished: bool) -> None:
        import trackio

        finish: Any = trackio.finish
        finish()


def open_trackio(folder: Path, step: int) -> Trackio:
    """Begin or continue the run, which trackio knows by its name."""
    os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))  # read when trackio is imported
    import trackio
    from trackio import fragments
    from trackio.sqlite_storage import SQLiteStorage

    run_id = read_run_id(folder, "trackio") or secrets.token_hex(4)
    write_run_id(folder, "trackio", run_id)
    project, name = os.environ.get("TRACKIO_PROJECT") or PROJECT, f"{folder.resolve().name}-{run_id}"
    facts = run_facts(folder)
    run: Any = trackio.init(project=project, name=name, resume="allow", config=facts, embed=False)
    if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
        return Trackio(run, dict.fromkeys(("train", "validation"), step))  # what it has cannot be read
    fragments.import_inbox_dir()  # what was written to a network file system
    rows = SQLiteStorage.get_logs(project, name, run_id=run.id)
    return Trackio(run, last_steps([(key, row["step"]) for row in rows for key in row if "/" in key]))
