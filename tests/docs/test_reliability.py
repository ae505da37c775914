"""Every test and script that RELIABILITY.md names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "RELIABILITY.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists():
    files = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"(test_\w+\.py)(?:::(test_\w+))?(\.\.\.)?", PAGE)
    assert len(named) > 100
    missing = [
        (file, test)
        for file, test, cut in named
        if file not in files or (test and f"def {test}{'' if cut else '('}" not in files[file])
    ]
    assert missing == []


def test_every_script_that_the_page_names_exists():
    for script in re.findall(r"`(tests/\S+\.py)", PAGE):
        assert (ROOT / script).is_file(), script
