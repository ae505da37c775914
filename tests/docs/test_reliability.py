"""Every test and script that RELIABILITY.md names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "RELIABILITY.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists():
    texts = {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"((?:\w+/)*test_\w+\.py)(?:::(test_\w+))?(\.\.\.)?", PAGE)
    assert len(named) > 100
    missing = [
        (file, test)
        for file, test, cut in named
        if not any(f"/{path}".endswith(f"/{file}") and defines(text, test, bool(cut)) for path, text in texts.items())
    ]
    assert missing == []


def defines(text: str, test: str, cut: bool) -> bool:
    """Whether a file's text defines a test; if cut, one whose name begins so."""
    return not test or f"def {test}{'' if cut else '('}" in text


def test_every_script_that_the_page_names_exists():
    for script in re.findall(r"`(tests/\S+\.py)", PAGE):
        assert (ROOT / script).is_file(), script
