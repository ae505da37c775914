"""The captions of the same images at each validation of a run: examples.jsonl, and the section that shows them."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from grr.evaluation.examples import Caption, Examples
from grr.files.atomic import write_atomic
from grr.reports.page import scrolling, section
from grr.reports.samples import SMALL, picture
from grr.training.log import LogLine, kept_step

IMAGES, VALIDATIONS = 6, 6  # that are shown


def record_captions(folder: Path, rows: Sequence[LogLine], examples: Examples) -> None:
    """Add the captions of the last validation in the log, `rows`, to folder/examples.jsonl.

    The line replaces the one of the same validation, and later ones: a resumed run computes them again.
    """
    if not rows or not examples.captions:
        return
    row = rows[-1]
    line = {
        "step": row["step"],
        "split": row["split"],
        "distinct_captions": examples.distinct_captions,
        "written_captions": examples.written_captions,
        "captions": {one.name: one.written for one in examples.captions},
    }
    earlier = [other for other in _read(folder) if _key(other) < _key(line)]
    write_atomic(folder / "examples.jsonl", "".join(json.dumps(one) + "\n" for one in [*earlier, line]))


def show_history(folder: Path, rows: Sequence[LogLine], captions: Sequence[Caption]) -> str:
    """A table of images with the captions that the model wrote for them at the validations in the log, `rows`.

    Lines of examples.jsonl whose validation is not in the log are not shown: a run was resumed before it.
    """
    logged = {(row["step"], row["split"]) for row in rows}
    lines = [line for line in _read(folder) if (line["step"], line["split"]) in logged]
    if len(lines) > 1 and lines[-1]["split"] == "final":
        kept = kept_step(next(row for row in reversed(rows) if row["split"] == "final"))
        same = [line for line in lines[:-1] if line["step"] == kept and line["captions"] == lines[-1]["captions"]]
        lines = lines[:-1] if same else lines
    if len(lines) < 2:
        return ""
    n = min(VALIDATIONS, len(lines))
    lines = [lines[round(i * (len(lines) - 1) / (n - 1))] for i in range(n)]
    images = [one for one in captions if one.name in lines[-1]["captions"]][:IMAGES]
    head = "".join(map(_heading, lines))
    body = ""
    for one in images:
        first = one.references[0] if one.references else ""
        written = [line["captions"].get(one.name) for line in lines]
        cells = "".join(f"<td>{'–' if text is None else escape(text) or '<i>(empty)</i>'}</td>" for text in written)
        image = f"<th scope=row>{picture(one.image, first, side=SMALL)}</th>"
        body += f"<tr>{image}{cells}<td class=true>{escape(first)}</td></tr>"
    table = f"<thead><tr><td></td>{head}<th scope=col>reference</th></tr></thead><tbody>{body}</tbody>"
    return section(
        "The same images at each validation",
        "What the model wrote, from the first validation to the last.",
        scrolling(f"<table class=history>{table}</table>"),
    )


def _heading(line: dict[str, Any]) -> str:
    where = "model/" if line["split"] == "final" else f"step {line['step']:,}"
    count = f"{line['distinct_captions']:,} of {line['written_captions']:,} captions are distinct"
    return f"<th scope=col>{where}<small>{count}</small></th>"


def _key(line: dict[str, Any]) -> tuple[int, bool]:
    """The order of lines: the model that a run leaves comes after the validation at its last step."""
    return line["step"], line["split"] == "final"


def _read(folder: Path) -> list[dict[str, Any]]:
    """The lines of folder/examples.jsonl that are whole; none if there is no file."""
    file = folder / "examples.jsonl"
    lines = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
            if isinstance(line["captions"], dict) and isinstance(line["step"], int):
                lines.append({"split": "validation", "distinct_captions": 0, "written_captions": 0, **line})
        except (ValueError, KeyError, TypeError):
            continue
    return lines
