"""Results of image files as JSON lines: the next run completes what a killed run left."""

import functools
import json
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.checkpoint.run_lock import RunLock
from grr.cli import models
from grr.files.printable import printable, printable_lines
from grr.inference import results
from grr.inference.results import Outcome, Row, read_results, summary, write_results
from grr.reports.table import aligned

NAMES = ["a.jpg", "ü.png", "new\nline.jpg", "not \udcff utf-8.jpg", "line\u2028separator.jpg", "f.jpg", "g.jpg"]
MADE = {"model": "m", "generation": {"num_beams": 2}}


class Worker:
    """Returns the length of each name, two names per batch, and records the calls; `bad` names are unreadable."""

    def __init__(self, bad: tuple[str, ...] = ()) -> None:
        self.asked: list[str] = []
        self.bad = bad

    def __call__(self, files: list[str]):
        for i in range(0, len(files), 2):
            self.asked += files[i : i + 2]
            yield [self.row(file) for file in files[i : i + 2]]

    def row(self, file: str) -> Row:
        return {"file": file, "error": "torn"} if file in self.bad else {"file": file, "length": len(file)}


@given(cut=st.floats(0, 1), bad=st.sets(st.sampled_from(NAMES)))
def test_a_file_cut_at_any_byte_is_completed_without_repeating_whole_lines(cut, bad):
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.jsonl")
        write_results(output, NAMES, MADE, Worker(tuple(bad)))
        whole = output.read_bytes()
        kept = whole[: round(cut * len(whole))]
        output.write_bytes(kept)
        again = Worker(tuple(bad))
        outcome = write_results(output, NAMES, MADE, again)
        rows = read_results(output)
    assert outcome == Outcome(
        len(NAMES) - len(bad),
        len(NAMES) - len(again.asked),
        dict.fromkeys((name for name in NAMES if name in bad), "torn"),
    )
    assert sorted(map(str, rows)) == sorted(str(again.row(name)) for name in NAMES)
    intact = [json.loads(line)["file"] for line in kept.split(b"\n")[:-1]]
    assert sorted(again.asked) == sorted(set(NAMES) - (set(intact) - bad))


@given(
    where=st.lists(st.sampled_from(["", "0", "1", "2", "01"]), min_size=len(NAMES), max_size=len(NAMES)),
    cut=st.integers(0, 60),
)
def test_what_several_processes_wrote_is_joined_and_completed_each_once(where, cut):
    """The files of processes that were killed, also between joining them and removing them."""
    with tempfile.TemporaryDirectory() as folder:
        output, worker = Path(folder, "out.jsonl"), Worker()
        write_results(output, [], MADE, worker)
        for rank, file in (("0", output), ("1", ".out.rank1.jsonl"), ("2", ".out.rank2.jsonl")):
            rows = [worker.row(name) for name, ranks in zip(NAMES, where, strict=True) if rank in ranks]
            content = b"".join(map(results.json_line, rows))
            Path(folder, file).write_bytes(content[: len(content) - cut] if rank == "2" else content)
        there = {row["file"] for file in Path(folder).glob("*.jsonl") for row in read_results(file)}
        there |= {row["file"] for file in Path(folder).glob(".*.jsonl") for row in read_results(file)}
        assert write_results(output, NAMES, MADE, worker) == (len(NAMES), len(there), {})
        assert sorted(worker.asked) == sorted(set(NAMES) - there)
        assert sorted(row["file"] for row in read_results(output)) == sorted(NAMES)
        assert not list(Path(folder).glob(".out*"))


def test_each_batch_is_on_disk_before_the_next_starts(tmp_path):
    output = tmp_path / "deep/out.jsonl"
    counts = []

    def work(files):
        for file in files:
            counts.append(len(read_results(output)))
            yield [{"file": file, "caption": "x"}]

    write_results(output, NAMES, MADE, work)
    assert counts == list(range(len(NAMES)))


def test_unreadable_files_are_tried_again_and_their_errors_removed(tmp_path):
    output = tmp_path / "out.jsonl"
    first = write_results(output, NAMES, MADE, Worker(bad=("f.jpg",)))
    assert (first.done, first.bad, first.status) == (6, {"f.jpg": "torn"}, 0)
    mended = Worker()
    assert write_results(output, NAMES, MADE, mended) == (7, 6, {})
    assert mended.asked == ["f.jpg"]
    assert all("error" not in row for row in read_results(output))


def test_other_files_are_added(tmp_path):
    output = tmp_path / "out.jsonl"
    write_results(output, NAMES[:3], MADE, Worker())
    assert write_results(output, NAMES[2:], MADE, Worker()) == (5, 1, {})
    assert [row["file"] for row in read_results(output)] == NAMES


def test_lines_are_json_of_readable_utf_8(tmp_path):
    write_results(tmp_path / "out.jsonl", NAMES, MADE, Worker())
    text = (tmp_path / "out.jsonl").read_bytes().decode()
    assert '{"file": "ü.png", "length": 5}\n' in text
    assert len(text.split("\n")) == len(NAMES) + 1


def test_a_run_without_results_has_status_1(tmp_path):
    assert write_results(tmp_path / "out.jsonl", ["f.jpg"], MADE, Worker(bad=("f.jpg",))).status == 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            {**MADE, "model": "n"},
            r'out.jsonl was written with other options \(model is "m" there and "n" now\); set another file,',
        ),
        ({"model": "m"}, r"written with other options \(generation.num_beams is 2 there and not set now\)"),
        (
            {**MADE, "generation": {"num_beams": 2, "prefix": None}},
            r"\(generation.prefix is not set there and null now\)",
        ),
        ({**MADE, "classes": list(range(12))}, r"classes.0 is not set there and 0 now; .*; and 2 more\)"),
    ],
)
def test_results_with_other_options_are_refused_and_unchanged(tmp_path, made, message):
    output = tmp_path / "out.jsonl"
    write_results(output, NAMES, MADE, Worker())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        write_results(output, NAMES, made, Worker())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_file_of_another_program_is_refused_and_unchanged(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"file": "a.jpg", "caption": "written by hand, for weeks"}\n')
    with pytest.raises(ValueError, match=r"write_results: .*mine.jsonl exists without mine.made_with.json"):
        write_results(tmp_path / "mine.jsonl", NAMES, MADE, Worker())
    assert "weeks" in (tmp_path / "mine.jsonl").read_text()


def test_a_second_writer_is_refused_while_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RunLock", functools.partial(RunLock, patience=0.0))
    output, second = tmp_path / "out.jsonl", Worker()

    def work(files):
        for rows in Worker()(files):
            yield rows
            with pytest.raises(BlockingIOError, match=r"is being written by process .*set another folder to write to"):
                write_results(output, NAMES, MADE, second)

    assert write_results(output, NAMES, MADE, work) == (len(NAMES), 0, {})
    assert [row["file"] for row in read_results(output)] == NAMES
    assert write_results(output, NAMES, MADE, second) == (len(NAMES), len(NAMES), {})  # the first has released the lock
    assert second.asked == []


def test_the_summary_has_counts_and_printable_file_names():
    outcome = Outcome(1200, 200, {"x\x1b[2J.jpg": "No such file or directory"})
    assert summary(outcome, what="captioned") == (
        "1,200 images captioned, 200 of them before; 1 could not be read:\n  'x\\x1b[2J.jpg': No such file or directory"
    )
    assert summary(Outcome(3, 0, {}), what="captioned") == "3 images captioned"
    assert all("\n" not in printable(name) and printable(name).encode() for name in NAMES)


def test_a_caption_and_the_name_of_its_file_are_printed_without_control_characters(capsys):
    rows = [{"file": "a\x1b[2J.jpg", "caption": "a \x07 fox"}, {"file": "b\n.jpg", "error": "no \x1b]0;title\x07"}]
    assert models._print_rows([rows], lambda row: row["caption"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "'a\\x1b[2J.jpg': 'a \\x07 fox'\n"
    assert captured.err == "'b\\n.jpg' could not be read: 'no \\x1b]0;title\\x07'\n"


def test_a_table_is_printed_without_control_characters():
    assert aligned([["name", "R@1"], ["a\x1b[2J", "98.2\u202f%"]]).splitlines()[2] == "'a\\x1b[2J'  98.2\u202f%"


@given(text=st.text(st.characters() | st.sampled_from("\x1b\x07\r\n\t\x9b\u202e\u2066\ud800\u3000é"), max_size=30))
def test_no_control_character_reaches_a_terminal(text):
    for shown in (printable(text), printable_lines(text)):
        assert shown.encode() or not text
        assert not [c for c in shown if unicodedata.category(c)[0] == "C" and c != "\n"]
    assert "\n" not in printable(text)
    assert printable_lines(text).count("\n") == text.count("\n")


@pytest.mark.parametrize("text", ["a b.jpg", "日本\u3000語.jpg", "98.2\u202f%", "naïve café", "دليل.jpg", "😀.png"])
def test_a_text_that_a_terminal_can_show_stays_as_it_is(text):
    assert printable(text) == printable_lines(text) == text
