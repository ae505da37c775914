"""Every example of docs/ runs as it stands: what a reader pastes, in the order of the page, in an empty folder.

Of a page, ```python and ```sh blocks are run, one after the other; a block whose first line is a comment with the name
of a file (# mine.py) is saved under that name instead. A ```text block is what the block before it prints, line by
line, where "..." stands for anything, and whole lines may be left out. Comments above a block steer it:
<!-- test: run.max_steps=4 --> shortens its last command, <!-- fails --> says that it ends with an error, as the page
does, <!-- not run: why --> leaves it out.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
REASONS = ("it needs a cluster",)
FENCE = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    arguments: str  # that shorten its last command
    fails: bool
    reason: str  # why it is not run

    @property
    def file(self) -> str | None:
        """The name it is to be saved under."""
        named = re.match(r"# ([\w./]+\.(?:py|yaml|sbatch))\n", self.text)
        return named[1] if named else None


def examples(page: str) -> list[Example]:
    found = []
    for comments, language, text in FENCE.findall((ROOT / "docs" / page).read_text()):
        test, reason = (re.search(rf"<!-- {word}: (.*) -->", comments) for word in ("test", "not run"))
        found.append(Example(language, text, test[1] if test else "", "<!-- fails -->" in comments,
                             reason[1] if reason else ""))  # fmt: skip
    return found


def run(example: Example, folder: Path) -> str:
    """Run it as its reader would; gives what it printed."""
    text = example.text.rstrip()
    if example.language == "python":
        command = [sys.executable, "-c", text]
    else:
        command = ["bash", "-e", "-o", "pipefail", "-c", f"{text} {example.arguments}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, timeout=300, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert (done.returncode != 0) == example.fails, f"{text}\n--- ended with {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def assert_printed(expected: str, output: str) -> None:
    """Every line of expected stands in the output, in this order."""
    rest = output
    for line in expected.splitlines():
        pattern = ".*".join(re.escape(part.strip()) for part in line.strip().split("..."))
        seen = re.search(pattern, rest)
        assert seen, f"the page promises {line!r}, which is not in the rest of\n{output[-4000:]}"
        rest = rest[seen.end() :]


def test_pages_are_listed_and_none_has_a_block_that_nobody_reads():
    listed = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text())
    assert sorted(listed) == [page for page in PAGES if page != "README.md"]
    for page in listed:
        known = {example.language for example in examples(page)} <= {"python", "sh", "text", "yaml"}
        assert known, page
        assert any(not example.reason for example in examples(page) if example.language in ("python", "sh")), page
        assert {example.reason for example in examples(page)} <= {"", *REASONS}, page


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_a_page_does_what_it_says(page, tmp_path):
    output = ""
    for example in examples(page):
        if example.reason:
            continue
        if example.language == "text":
            assert_printed(example.text, output)
        elif example.file:
            (tmp_path / example.file).write_text(example.text)
        elif example.language in ("python", "sh"):
            output = run(example, tmp_path)
