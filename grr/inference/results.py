"""Results of a run over image files, as JSON lines that are written batch by batch, so a killed run can continue."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch.distributed as dist

from grr.checkpoint.run_lock import RunLock, refuse_other_writers
from grr.files.atomic import replace_file, write_atomic
from grr.files.lock import lock
from grr.files.printable import printable
from grr.parallel.process_group import on_rank_0, rank_and_world, wait_for_all
from grr.parallel.progress import shared_bar

NAMED = 100  # files in a message
DIFFERENCES = 10  # options in a message

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

    Called by all processes of a group alike: each works on a part of the files, those beside rank 0 append to files
    beside output, which are moved into it at the end or by the next run, and all return the counts of all.
    Files that already have a result are skipped; files with an error are tried again. `made_with`, of JSON values, is
    saved beside output in NAME.made_with.json. A progress bar is shown if it is named. Only the names of the files are
    held in memory. Raises ValueError, and changes no file, if output was written with other options; BlockingIOError,
    as RunLock does, if another process writes into the folder of output.
    """
    made = json.loads(json.dumps(made_with))
    rank, world = rank_and_world()
    with RunLock(output.parent):
        on_rank_0(lambda: _begin(output, made))
        finished = {row["file"] for row in rows_of(output)}
        left = [file for file in files if file not in finished]
        wait_for_all()  # nobody writes before all have read
        mine = left[rank * len(left) // world : (rank + 1) * len(left) // world]
        before, bad = len(files) - len(left), dict[str, str]()
        log = output if rank == 0 else output.with_name(f".{output.stem}.rank{rank}.jsonl")
        with (
            held(log) as lines,
            shared_bar(output.parent, total=len(files), initial=before, name=progress) as add,
        ):
            for rows in work(mine) if mine else ():
                lines.write(b"".join(map(json_line, rows)))
                lines.flush()
                bad |= {row["file"]: row["error"] for row in rows if "error" in row}
                add(len(rows))
        on_rank_0(lambda: _join(output))
    if world > 1:
        of_all: list[Any] = [None] * world
        dist.all_gather_object(of_all, bad)
        bad = {file: cause for some in of_all for file, cause in some.items()}
    return Outcome(len(files) - len(bad), before, bad)


def read_results(output: Path) -> list[Row]:
    """Returns the rows of output, without an incomplete last line; none if the file does not exist."""
    return list(rows_of(output))


def summary(outcome: Outcome, *, what: str) -> str:
    """Returns the message of a finished run: "12 images captioned, 3 of them before", and its bad files."""
    first = f"{outcome.done:,} images {what}" + (f", {outcome.before:,} of them before" if outcome.before else "")
    if not outcome.bad:
        return first
    bad = [f"  {printable(file)}: {printable(cause)}" for file, cause in list(outcome.bad.items())[:NAMED]]
    if len(outcome.bad) > NAMED:
        bad.append(f"  and {len(outcome.bad) - NAMED:,} more")
    return "\n".join([f"{first}; {len(outcome.bad):,} could not be read:", *bad])


def rows_of(*outputs: Path) -> Iterator[Row]:
    """Yield the rows of files that exist, one at a time, without incomplete last lines."""
    for output in outputs:
        if not output.is_file():
            continue
        with output.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:  # a last line that a killed run did not finish
                    continue
                if line.endswith(b"\n") and isinstance(row, dict) and "file" in row:
                    yield row


def json_line(row: Row) -> bytes:
    """Returns a row as a line of JSON, in UTF-8."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a file's name need not be UTF-8
        return json.dumps(row).encode() + b"\n"


@contextmanager
def held(log: Path) -> Iterator[IO[bytes]]:
    """Open a file to append to it, locked until the end of the block, which `refuse_other_writers` sees."""
    with log.open("ab") as lines:
        lock(lines.fileno())
        yield lines


def check_made_with(who: str, results: Path, made: dict[str, Any]) -> None:
    """Raise ValueError if results, a file or a folder, were made with other options, naming both values of each."""
    file, kind = made_with_file(results), "folder" if results.is_dir() else "file"
    try:
        there = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError):
        raise ValueError(
            f"{who}: {results} exists without {file.name}, which names the model and options that "
            f"it was written with; set another {kind}, or move that one away"
        ) from None
    before, now = dict(_entries(there)), dict(_entries(made))
    changed = [
        f"{key} is {before.get(key, 'not set')} there and {now.get(key, 'not set')} now"
        for key in sorted(before.keys() | now.keys())
        if (key in before, before.get(key)) != (key in now, now.get(key))
    ]
    if changed:
        more = [f"and {len(changed) - DIFFERENCES:,} more"] if len(changed) > DIFFERENCES else []
        raise ValueError(
            f"{who}: {results} was written with other options ({'; '.join(changed[:DIFFERENCES] + more)}); set another "
            f"{kind}, or delete that one to start again"
        )


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested objects and lists as text, by names such as generation.seed."""
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _entries(one, f"{name}.{key}" if name else str(key))
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def write_made_with(results: Path, made: dict[str, Any]) -> None:
    """Write what results are made with, JSON values, beside them."""
    write_atomic(made_with_file(results), json.dumps(made, indent=2).encode())


def made_with_file(results: Path) -> Path:
    """Returns the file that says what results, a file or a folder, were made with."""
    if results.is_dir():
        return results / "captions.made_with.json"
    return results.with_name(results.stem + ".made_with.json")


def _begin(output: Path, made: dict[str, Any]) -> None:
    """Check what output was made with, and leave in it the results of all earlier runs, without errors."""
    if output.is_file() and output.stat().st_size:
        check_made_with("write_results", output, made)
    write_made_with(output, made)
    _join(output, errors=False)


def _join(output: Path, *, errors: bool = True) -> None:
    """Move the complete lines that other processes wrote beside output into it; without those of errors, if asked."""
    prefix = f".{output.stem}.rank"
    found = output.parent.glob(f"{escape(prefix)}*.jsonl")
    logs = sorted(found, key=lambda log: int(log.stem.removeprefix(prefix)))
    refuse_other_writers(logs)
    if errors and not logs:
        return
    finished, aside = set[str](), output.with_name(output.name + ".tmp")
    with aside.open("wb") as lines:
        for row in rows_of(output, *logs):
            if row["file"] not in finished and (errors or "error" not in row):
                finished.add(row["file"])
                lines.write(json_line(row))
    replace_file(aside, output)
    for log in logs:
        log.unlink()
