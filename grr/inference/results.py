"""What came of image files, a line of JSON each, written as it comes; a killed run goes on where it stopped."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from grr.checkpoint.training_state import RunLock
from grr.files.printable import printable

Row = dict[str, Any]  # "file", and what came of it, or "error" and why nothing did


class Outcome(NamedTuple):
    """How a run over some files ended."""

    done: int  # files that something came of
    before: int  # of these, in earlier runs
    bad: dict[str, str]  # files that nothing came of, and why

    @property
    def status(self) -> int:
        """The exit status of a program: 0 if something came of one file at least."""
        return 0 if self.done else 1


def write_results(
    output: Path,
    files: Sequence[str],
    made_with: dict[str, Any],
    work: Callable[[list[str]], Iterable[list[Row]]],
    *,
    progress: str | None = None,
) -> Outcome:
    """Add what work(files) gives, batch by batch, to output, a line of JSON a file: each batch is on disk as it comes.

    Files that something came of before are passed over; those that nothing came of are tried again. `made_with`, JSON
    values, is kept beside it, in NAME.made_with.json. Progress is shown under a name, if there is one.
    Raises ValueError, and changes nothing, if output was made with anything else; BlockingIOError, as RunLock does, if
    another process writes into the folder of output.
    """
    made = json.loads(json.dumps(made_with))
    with RunLock(output.parent):
        _refuse_other(output, made)
        whole = [row for row in read_results(output) if "error" not in row]  # without errors, and without a torn line
        _replace(_beside(output), json.dumps(made, indent=2).encode())
        _replace(output, b"".join(map(_line, whole)))

        known = {row["file"] for row in whole}
        left = [file for file in files if file not in known]
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
    """The rows that were written to output, without a last one that is torn; none if there is no such file."""
    return list(_rows(output)) if output.is_file() else []


def told(outcome: Outcome, *, what: str) -> str:
    """How a run ended, for a terminal: "12 images captioned, 3 of them before", and the files that nothing came of."""
    first = f"{outcome.done:,} images {what}" + (f", {outcome.before:,} of them before" if outcome.before else "")
    if not outcome.bad:
        return first
    return "\n".join(
        [
            f"{first}; {len(outcome.bad):,} could not be read:",
            *(f"  {printable(file)}: {printable(why)}" for file, why in outcome.bad.items()),
        ]
    )


def _refuse_other(output: Path, made: dict[str, Any]) -> None:
    if not output.is_file() or output.stat().st_size == 0:
        return
    try:
        there = dict(json.loads(_beside(output).read_bytes()))
    except (OSError, ValueError):
        raise ValueError(
            f"write_results: {output} is there already, and {_beside(output).name}, which says what it was made with, "
            "is not beside it; set another file, or move that one away"
        ) from None
    changed = [
        f"{key}: {there.get(key)} there, {made.get(key)} here"
        for key in sorted(there.keys() | made.keys())
        if there.get(key) != made.get(key)
    ]
    if changed:
        raise ValueError(
            f"write_results: {output} was made with something else ({'; '.join(changed)}); set another "
            "file or folder, or delete that one to begin anew"
        )


def _rows(output: Path) -> Iterator[Row]:
    with output.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # what a kill left of the last line
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


def _replace(file: Path, data: bytes) -> None:
    aside = file.with_name(file.name + ".tmp")
    aside.write_bytes(data)
    aside.replace(file)
