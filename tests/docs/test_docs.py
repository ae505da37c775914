"""Every example of the README and of docs/ runs as it stands: what a reader pastes, in the order of the page, in an
empty folder; the README's in one with the recipes of the checkout, a trained model and some pictures.

Of a page, ```python and ```sh blocks are run, one after the other; a block whose first line is a comment with the name
of a file (# mine.py) is saved under that name instead. A ```text block stands directly behind another and is what that
one prints: its lines are whole lines of the output, in their order, where "..." stands for anything, and lines of the
output may be left out. Comments above a block steer it: <!-- test: run.max_steps=4 --> shortens its last command,
<!-- fails --> says that it ends with an error, as the page does, <!-- not run: why --> leaves it out.
"""

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from grr.checkpoint.training_state import RunLock
from grr.data import DATASETS, training_steps
from grr.experiments import catalog as installed
from grr.tokenizers import train_tokenizer

ROOT = Path(__file__).parents[2]
LIST, README = "README.md", "../README.md"  # docs/README.md lists the pages
PAGES = [README, *sorted(page.name for page in (ROOT / "docs").glob("*.md"))]
REASONS = ("it needs a cluster", "it needs CC12M", "it installs what runs the test", "tests/test_make.py is its test")
FENCE = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    comments: str  # the lines above it
    arguments: str  # that shorten its last command
    fails: bool
    reason: str  # why it is not run

    @property
    def file(self) -> str | None:
        """The name it is to be saved under."""
        named = re.match(r"# ([\w./]+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None

    @property
    def runs(self) -> bool:
        return self.language in ("python", "sh") and not self.file and not self.reason


def read(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def examples(page: str) -> list[Example]:
    found = []
    for comments, language, text in FENCE.findall(read(page)):
        test, reason = (re.search(rf"<!-- {word}: (.*) -->", comments) for word in ("test", "not run"))
        found.append(
            Example(
                language,
                text,
                comments,
                test[1] if test else "",
                "<!-- fails -->" in comments,
                reason[1] if reason else "",
            )
        )
    return found


def run(example: Example, folder: Path) -> str:
    """Run it as its reader would; gives what it printed."""
    text = example.text.rstrip()
    if example.language == "python":
        command = [sys.executable, "-c", text]
    else:
        command = ["bash", "-e", "-o", "pipefail", "-c", f"{text} {example.arguments}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # readers have none
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (done.returncode != 0) == example.fails, f"{text}\n--- ended with {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def assert_printed(expected: str, output: str) -> None:
    """Every line of expected is a line of the output, in this order."""
    printed = iter(output.splitlines())  # a progress bar's carriage return ends a line, too
    for line in expected.splitlines():
        pattern = re.compile(".*".join(re.escape(part) for part in line.strip().split("...")))
        seen = any(pattern.fullmatch(candidate.strip()) for candidate in printed)
        assert seen, f"the page promises {line!r}, which is not in the rest of\n{output[-4000:]}"


@pytest.mark.parametrize("promised", ["60 images", "600 images", "... images", "step ... of 4\n600 images in index"])
def test_what_a_page_promises_is_looked_for_in_whole_lines_and_in_their_order(promised):
    output = "  600 images in index\nstep 4\rstep 4 of 4\n"
    assert_printed("600 ... in index\nstep ... of 4", output)
    with pytest.raises(AssertionError, match="the page promises"):
        assert_printed(promised, output)


def test_a_block_that_ends_otherwise_than_its_page_says_is_noticed(tmp_path):
    good, bad = (
        Example("sh", "echo fine", "", "", False, ""),
        Example("python", "raise SystemExit(3)", "", "", False, ""),
    )
    assert run(good, tmp_path) == "fine\n"
    with pytest.raises(AssertionError, match="ended with 0"):
        run(good._replace(fails=True), tmp_path)
    with pytest.raises(AssertionError, match="ended with 3"):
        run(bad, tmp_path)


def test_the_list_names_every_page():
    listed = re.findall(r"\]\((\w+\.md)\)", read("README.md"))
    assert sorted(listed) == [page for page in PAGES if page not in (LIST, README)]


@pytest.mark.parametrize("page", PAGES)
def test_no_block_of_a_page_escapes_the_test(page):
    found = examples(page)
    assert len(re.findall(r"^\s*(?:```|~~~)", read(page), re.MULTILINE)) == 2 * len(found), "a fence of another kind"
    assert read(page).count("<!--") == sum(e.comments.count("<!--") for e in found), "a comment above no block"
    for comment in "".join(e.comments for e in found).splitlines():
        assert re.fullmatch(r"<!-- (fails|test: [^\n]*|not run: [^\n]*) -->", comment), comment
    for example in found:
        assert example.language in ("python", "sh", "text") or (example.language == "yaml" and example.file), example
        assert example.reason in ("", *REASONS)
    for before, after in pairwise(found):
        assert after.language != "text" or before.runs, f"nothing prints {after.text!r}"
    assert page == LIST or any(example.runs for example in found)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_configs_that_a_page_names_exist(page):
    for link in re.findall(r"\]\(([\w./-]+)\)", read(page)):
        assert ((ROOT / "docs" / page).parent / link).exists(), link
    for name in re.findall(r"grr (?:run|cp|check)(?: --nproc \d+)? ([a-z_]+(?:/[a-z_0-9]+)?)(?![\w./])", read(page)):
        assert installed.find(name)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != LIST])
def test_a_page_does_what_it_says(page, tmp_path, request):
    if page == README:
        prepare(tmp_path, request.getfixturevalue("colour_run"))
    output = ""
    for example in examples(page):
        if example.language == "text":
            assert_printed(example.text, output)
        elif example.file:
            (tmp_path / example.file).write_text(example.text)
        elif example.runs:
            output = run(example, tmp_path)


COUNT = 120  # pictures, of which some are for validation


def prepare(folder: Path, trained: Path) -> None:
    """What the README's reader has: the recipes of the checkout, a trained model, and a folder of pictures."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    shutil.copytree(trained, folder / "runs/openmoji")
    photos(folder / "my_photos", [f"{i}.png" for i in range(COUNT)])
    Image.new("RGB", (40, 30), "red").save(folder / "photo.jpg")


def photos(folder: Path, named: list[str]) -> None:
    """Pictures with a table that names these."""
    folder.mkdir()
    for i in range(COUNT):
        Image.new("RGB", (20, 20), (i, 99, 0)).save(folder / f"{i}.png")
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f"{name},a picture\n" for name in named))


# --- messages ------------------------------------------------------------------------------------------------------


def no_image(folder: Path) -> None:
    photos(folder / "photos", [f"photos/{i}.png" for i in range(COUNT)])
    DATASETS["folder"](path=str(folder / "photos"))


def two_runs(folder: Path) -> None:
    with RunLock(folder):
        RunLock(folder, patience=0)


def uneven_batches(folder: Path) -> None:
    photos(folder / "photos", [f"{i}.png" for i in range(COUNT)])
    pairs = DATASETS["folder"](path=str(folder / "photos"))
    tokenizer = train_tokenizer(pairs.captions, folder / "t.model", vocab_size=30, context_length=16)
    training_steps(
        pairs,
        tokenizer,
        rank=0,
        world=2,
        seed=0,
        start_step=0,
        batch_size=8,
        micro_batch_size=8,
        image_size=16,
        pin_memory=False,
    )


RAISED = {
    "the first ... images of the table (...) are in none of ...": no_image,
    "is being written by process ...": two_runs,
    "batch_size must be a multiple of ...": uneven_batches,
}


def test_every_message_that_a_page_quotes_is_one_of_those_that_are_raised_here():
    quoted = [message for page in PAGES for message in re.findall(r'\*\*"(.+?)"\.?\*\*', read(page))]
    assert sorted(quoted) == sorted(RAISED)


@pytest.mark.parametrize("message", RAISED)
def test_a_message_that_a_page_quotes_is_raised(message, tmp_path):
    pattern = ".+".join(re.escape(part) for part in message.split("..."))
    with pytest.raises((ValueError, OSError), match=pattern):
        RAISED[message](tmp_path)
