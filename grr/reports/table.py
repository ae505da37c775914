"""Tables of texts for a terminal, for Markdown and for a page. The first row is the header."""

from collections.abc import Sequence
from html import escape

from grr.files.printable import printable

Table = Sequence[Sequence[str]]


def aligned(table: Table) -> str:
    """A table for a terminal: columns two spaces apart, the first aligned left, the others right."""
    table = [[printable(cell) for cell in row] for row in table]
    widths = [max(1, *map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown, with aligned columns."""
    table = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    first, *rest = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table)
    return "\n".join("| " + " | ".join(row) + " |" for row in [first, rule, *rest])


def html(table: Table, *, stacked: bool = False) -> str:
    """A table of a page, in a box that scrolls where the page is too narrow.

    A stacked table is a list on a phone instead: each row a heading, and its cells below it, each with its column.
    """
    first, *rest = table
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in first)
    body = ""
    for name, *cells in rest:
        pairs = zip(map(escape, first[1:]), map(escape, cells), strict=True)
        columns = "".join(f'<td data-column="{column}">{cell}</td>' for column, cell in pairs)
        body += f"<tr><th scope=row>{escape(name)}</th>{columns}</tr>"
    kind = " class=stacked" if stacked else ""
    return f"<div class=scroll><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
