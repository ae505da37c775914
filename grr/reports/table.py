"""A table of texts, written for a terminal, for Markdown, and for a page. Its first row is the header."""

from collections.abc import Sequence
from html import escape

from grr.files.printable import printable

Table = Sequence[Sequence[str]]


def aligned(table: Table) -> str:
    """Columns of equal width, two spaces apart, the first to the left and the others to the right."""
    table = [[printable(cell) for cell in row] for row in table]
    widths = [max(1, *map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown, readable as it stands."""
    table = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    first, *rest = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table)
    return "\n".join("| " + " | ".join(row) + " |" for row in [first, rule, *rest])


def html(table: Table) -> str:
    """A table that scrolls where the page is too narrow for it."""
    first, *rest = table
    head = "".join(f"<th>{escape(cell)}</th>" for cell in first)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
