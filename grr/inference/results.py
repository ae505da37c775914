"""Results of a run over image files, as JSON lines that are written batch by batch, so a killed run can continue."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from grr.checkpoint.run_lock import RunLock
from grr.files.atomic import write_atomic
from grr.files.printable import printable

Row = dict[str, Any]  # "file" and its results, or "file" and "error"


class Outcome(NamedTuple):
    """Counts of a run over image files."""

    done: int  # files with a result
    before: int  # of these, in earlier runs
    bad: dict[str, str]  # file without a result -> cause

    @property
    def status(self) -> int:
        """Exit status: 0 if at least one file has a result, else 1."""
        return 0 if self.done else 1


def write_results(
    output: Path,
    files: Sequence[str],
    made_with: dict[str, Any],
    work: Callable[[list[str]], Iterable[list[Row]]],
    *,
    progress: str | None = None,
) -> Outcome:
    """Append the rows of work(files) to output, a JSON line per file; each batch is flushed before the next.

    Files that already have a result are skipped; files with an error are tried again. `made_with`, of JSON values, is
    saved beside output in NAME.made_with.json. A progress bar is shown if it is named. Raises ValueError, and changes
    no file, if output was written with other options; BlockingIOError, as RunLock does, if another process writes into
    the folder of output.
    """
    made = json.loads(json.dumps(made_with))
    with RunLock(output.parent):
        _check_made_with(output, made)
        whole = [row for row in read_results(output) if "error" not in row]  # drops an incomplete last line
        write_atomic(_beside(output), json.dumps(made, indent=2).encode())
        write_atomic(output, b"".join(map(_line, whole)))

        finished = {row["file"] for row in whole}
        left = [file for file in files if file not in finished]
        done, bad = len(files) - len(left), dict[str, str]()
        with (
            output.open("ab") as lines,
            tqdm(total=len(files), initial=done, desc=progress, unit="image", disable=progress is None) as bar,
        ):
            for rows in work(left) if left else ():
                lines.write(b"".join(map(_line, rows)))
                lines.flush()
                bad |= {row["file"]: row["error"] for row in rows if "error" in row}
                bar.update(len(rows))
    return Outcome(len(files) - len(bad), done, bad)


def read_results(output: Path) -> list[Row]:
    """Returns the rows of output, without an incomplete last line; none if the file does not exist."""
    return list(_rows(output)) if output.is_file() else []


def summary(outcome: Outcome, *, what: str) -> str:
    """Returns the message of a finished run: "12 images captioned, 3 of them before", and its bad files."""
    first = f"{outcome.done:,} images {what}" + (f", {outcome.before:,} of them before" if outcome.before else "")
    if not outcome.bad:
        return first
    bad = [f"  {printable(file)}: {printable(cause)}" for file, cause in outcome.bad.items()]
    return "\n".join([f"{first}; {len(bad):,} could not be read:", *bad])


def _check_made_with(output: Path, made: dict[str, Any]) -> None:
    if not output.is_file() or output.stat().st_size == 0:
        return
    try:
        there = dict(json.loads(_beside(output).read_bytes()))
    except (OSError, ValueError):
        raise ValueError(
            f"write_results: {output} exists without {_beside(output).name}, which names the model and options that "
            "it was written with; set another file, or move that one away"
        ) from None
    changed = [
        f"{key}: {there.get(key)} in the file, {made.get(key)} now"
        for key in sorted(there.keys() | made.keys())
        if there.get(key) != made.get(key)
    ]
    if changed:
        raise ValueError(
            f"write_results: {output} was written with other options ({'; '.join(changed)}); set another "
            "file or folder, or delete that one to start again"
        )


def _rows(output: Path) -> Iterator[Row]:
    with output.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # a last line that a killed run did not finish
                continue
            if line.endswith(b"\n") and isinstance(row, dict) and "file" in row:
                yield row


def _line(row: Row) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a file's name need not be UTF-8
        return json.dumps(row).encode() + b"\n"


def _beside(output: Path) -> Path:
    return output.with_name(output.stem + ".made_with.json")
