"""Every example of the README and of docs/ runs.

The ```python and ```sh blocks of a page are run in order in an empty folder; those of the README in a folder with the
recipes of the checkout, a trained model and some images. A block whose first line is a comment with a file's name
(# mine.py) is saved under that name instead. A ```text block directly follows another block and is its output: each
line is a whole line of the output, in order, where "..." is any text and lines of the output may be left out. Comments
above a block: <!-- test: run.max_steps=4 --> appends to its last command, <!-- fails --> expects an error,
<!-- not run: why --> skips it.
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

from grr.checkpoint.run_lock import RunLock
from grr.data import DATASETS, training_steps
from grr.experiments import catalog as installed
from grr.tokenizers import train_tokenizer

ROOT = Path(__file__).parents[2]
LIST, README = "README.md", "../README.md"  # docs/README.md lists the pages
PAGES = [README, *sorted(page.name for page in (ROOT / "docs").glob("*.md"))]
REASONS = (
    "it needs a cluster",
    "it needs a GPU",
    "it needs CC12M",
    "it needs data of other people",
    "it needs the Hugging Face hub",
    "tests/test_make.py is its test",
)
FENCE = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    comments: str  # the lines above it
    arguments: str  # appended to its last command, to shorten it
    fails: bool
    reason: str  # why it is not run

    @property
    def file(self) -> str | None:
        """The name of the file in which to save it, or None."""
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
    """Run a block as a reader would. Returns its output."""
    text = example.text.rstrip()
    if example.language == "python":
        command = [sys.executable, "-c", text]
    else:
        command = ["bash", "-e", "-o", "pipefail", "-c", f"{text} {example.arguments}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # readers set none
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
    """Check that every line of expected is a line of the output, in this order."""
    printed = iter(output.splitlines())  # a progress bar's carriage return ends a line, too
    for line in expected.splitlines():
        pattern = re.compile(".*".join(re.escape(part) for part in line.strip().split("...")))
        matches = any(pattern.fullmatch(candidate.strip()) for candidate in printed)
        assert matches, f"the page prints {line!r}, which is not in the rest of\n{output[-4000:]}"


@pytest.mark.parametrize("wrong", ["60 images", "600 images", "... images", "step ... of 4\n600 images in index"])
def test_the_output_of_a_page_is_compared_by_whole_lines_in_order(wrong):
    output = "  600 images in index\nstep 4\rstep 4 of 4\n"
    assert_printed("600 ... in index\nstep ... of 4", output)
    with pytest.raises(AssertionError, match="the page prints"):
        assert_printed(wrong, output)


def test_a_block_with_an_unexpected_exit_status_fails(tmp_path):
    good, bad = (
        Example("sh", "echo fine", "", "", False, ""),
        Example("python", "raise SystemExit(3)", "", "", False, ""),
    )
    assert run(good, tmp_path) == "fine\n"
    with pytest.raises(AssertionError, match="ended with 0"):
        run(good._replace(fails=True), tmp_path)
    with pytest.raises(AssertionError, match="ended with 3"):
        run(bad, tmp_path)


def test_the_index_names_every_page():
    listed = re.findall(r"\]\((\w+\.md)\)", read("README.md"))
    assert sorted(listed) == [page for page in PAGES if page not in (LIST, README)]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_is_tested(page):
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
def test_the_blocks_of_a_page_run(page, tmp_path, request):
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


COUNT = 120  # images, of which some are for validation


def prepare(folder: Path, trained: Path) -> None:
    """Create what the README assumes: the recipes of the checkout, a trained model, and a folder of images."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    shutil.copytree(trained, folder / "runs/openmoji")
    photos(folder / "my_photos", [f"{i}.png" for i in range(COUNT)])
    Image.new("RGB", (40, 30), "red").save(folder / "photo.jpg")


def photos(folder: Path, named: list[str]) -> None:
    """Create images, and a table of captions that names the given files."""
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


def test_every_message_that_a_page_quotes_has_a_test():
    quoted = [message for page in PAGES for message in re.findall(r'\*\*"(.+?)"\.?\*\*', read(page))]
    assert sorted(quoted) == sorted(RAISED)


@pytest.mark.parametrize("message", RAISED)
def test_a_message_that_a_page_quotes_is_raised(message, tmp_path):
    pattern = ".+".join(re.escape(part) for part in message.split("..."))
    with pytest.raises((ValueError, OSError), match=pattern):
        RAISED[message](tmp_path)
