"""Self-contained HTML pages: their frame, their style (page.css) and the script of their charts (page.js)."""

from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template

from grr.files.atomic import write_atomic

HERE = Path(__file__).parent
FRAME = Template("""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
$css</style>
</head>
<body>
$body
<script>
$js</script>
</body>
</html>
""")


def write_page(path: Path, title: str, *parts: str) -> Path:
    """Write an HTML page of these parts, one below the other, and return its path.

    The page loads nothing and works without JavaScript. The title may be any text; parts are HTML, in which all quoted
    text is escaped already.
    """
    css, js = (HERE.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = "\n".join(part for part in parts if part)
    write_whole(path, FRAME.substitute(title=escape(title), css=css, js=js, body=body))
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all; half a surrogate pair, which UTF-8 does not have, becomes "?"."""
    write_atomic(path, text.encode("utf-8", "replace"))


def header(title: str, *facts: str, below: str = "") -> str:
    """The top of a page: the title, a line of facts and the date, any text each; then HTML."""
    now = datetime.now(UTC)
    facts = *map(escape, facts), f"written {now.day} {now:%B %Y, %H:%M} UTC"
    shown = " <i>·</i> ".join(f"<span>{fact}</span>" for fact in facts)
    return f"<header><h1>{escape(title)}</h1><p class=facts>{shown}</p>{below}</header>"


def scrolling(table: str) -> str:
    """A table, as HTML, in a box that scrolls, with a note where the page is as narrow as a phone."""
    return f"<p class=sideways>Scroll the table sideways.</p><div class=scroll>{table}</div>"


def section(heading: str, note: str, content: str) -> str:
    """A section: its heading and a note, HTML each, above its content; nothing without content."""
    return f"<section><h2>{heading}</h2>{f'<p>{note}</p>' if note else ''}{content}</section>" if content else ""
