"""Each logger has each step of a run once, whatever a kill left, and none of its faults reaches the run."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logged import TOOLS, need, read
from programs import run

from grr.training import loggers
from grr.training.log import MetricsLog, read_metrics
from grr.training.loggers import PACKAGES, Line, Sender, check_loggers

WORKER = Path(__file__).with_name("logger_worker.py")


def worker(folder: Path, *names: str, processes: int = 1, **order) -> subprocess.CompletedProcess:
    words = [str(WORKER), json.dumps({"folder": str(folder), "loggers": names, "offset": 0.0, **order})]
    return run(words, timeout=400, processes=processes, **order.get("environment", {}))


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_a_run_that_was_killed_twice_has_each_step_once(tool, tmp_path):
    """After step 12 of a run with a checkpoint of step 10, and after step 14 with one of step 13, before a tool that
    writes in the background has its lines. TensorBoard shows the values of the last time that a step was taken, the
    others those of the first that reached them."""
    need(tool)
    folder = tmp_path / "run"
    ends = [
        worker(folder, tool, step=0, last=12, end="wait"),
        worker(folder, tool, step=10, last=14, end="kill", offset=0.25),
        worker(folder, tool, step=13, last=15, end="close", offset=0.5),
    ]
    assert [end.returncode for end in ends] == [-signal.SIGKILL, -signal.SIGKILL, 0], ends[-1].stderr[-3000:]
    assert not any("must not end a run" in end.stderr for end in ends), [end.stderr[-2000:] for end in ends]
    logged = read(tool, folder)
    assert logged.runs == 1
    first = {step: float(step) for step in range(1, 13)} | {13: 13.25, 15: 15.5}
    repeated = {11: 11.25, 12: 12.25} if tool == "tensorboard" else {}
    losses = logged.metrics["train/loss"]
    assert [step for step, _ in losses] == list(range(1, 16))
    assert dict(losses).pop(14) in {"tensorboard": (14.5,), "mlflow": (14.25,)}.get(tool, (14.25, 14.5))
    assert {step: value for step, value in losses if step != 14} == first | repeated
    assert logged.metrics["validation/loss"] == [(5, 10.0), (10, 20.0), (15, 30.0)]
    assert logged.metrics["train/epoch"][4] == (5, 1.0)
    assert logged.metrics["final/loss"] == [(15, 0.5)]
    assert logged.captions == {step: [f"{step}\nof 6", f"{step}\nof 9"] for step in (5, 10, 15)}
    rows = [row for _, row in logged.metrics.get("_step", [])]  # by which wandb orders the files of its runs
    assert rows == sorted(set(rows))
    assert "train/lr" not in logged.metrics
    assert "0.125" in logged.config
    assert [line["loss"] for line in read_metrics(folder) if line["split"] == "train"][-5:] == [
        11.25,
        12.25,
        13.25,
        14.5,
        15.5,
    ]


@pytest.mark.slow
def test_a_logger_that_is_added_at_a_resume_gets_the_whole_log(tmp_path):
    need("tensorboard")
    for names, step, last in (((), 0, 7), (("tensorboard",), 6, 8)):
        assert worker(tmp_path / "run", *names, step=step, last=last, end="close").returncode == 0
    assert [step for step, _ in read("tensorboard", tmp_path / "run").metrics["train/loss"]] == list(range(1, 9))


@pytest.mark.slow
def test_a_run_that_begins_anew_is_another_run_of_the_logger(tmp_path):
    """It was killed before its first checkpoint: what it logged may be of another config."""
    need("trackio")
    for end in ("wait", "close"):
        worker(tmp_path / "run", "trackio", step=0, last=3, end=end)
    logged = read("trackio", tmp_path / "run")
    assert logged.runs == 2
    assert sorted(logged.metrics["train/loss"]) == [(s, float(s)) for s in (1, 2, 3) for _ in "ab"]


@pytest.mark.slow
def test_a_server_that_does_not_answer_does_not_end_a_run(tmp_path):
    need("mlflow")
    nobody = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = worker(tmp_path / "run", "mlflow", step=0, last=12, end="close", environment=nobody)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("a logger must not end a run") == 1
    assert "127.0.0.1" in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["split"] == "train"] == [*range(1, 13)]


class Folder:
    """A logger that adds its lines to a file in a folder, and fails while that is not there."""

    def __init__(self, folder: Path, held: dict[str, int]) -> None:
        self.held, self._file, self.ends = held, folder / "lines", []
        folder.stat()

    def write(self, line: Line) -> None:
        with self._file.open("a") as file:
            file.write(f"{line.split} {line.step}\n")

    def close(self, *, finished: bool) -> None:
        self.ends.append(finished)


@pytest.mark.parametrize("fails", ["at the start", "later", "until the end"])
def test_lines_wait_in_their_order_while_a_logger_fails(fails, tmp_path, monkeypatch, caplog):
    place, hidden = tmp_path / "place", tmp_path / "hidden"
    place.mkdir()
    if fails != "later":
        place.rename(hidden)
    opened = []

    def open_folder() -> Folder:
        opened.append(Folder(place, {"train": 2}))
        return opened[-1]

    lines = [Line("train", step, {}) for step in (1, 2, 3)]
    with caplog.at_level(logging.WARNING):
        one = Sender("folder", open_folder, lines)
        if fails == "later":
            place.rename(hidden)
        one.send(Line("train", 4, {}))
        one.send(Line("validation", 4, {}))
        if fails != "until the end":
            hidden.rename(place)
            one.send(Line("train", 5, {}))
            assert all("train 5" not in file.read_text() for file in place.iterdir())  # the next attempt is later
            monkeypatch.setattr(one, "_retry_at", 0.0)
            one.send(Line("final", 2, {}))
        else:
            hidden.rename(place)
        one.close(finished=True)
    sent = (place / "lines").read_text().splitlines()
    more = ["train 5", "final 2"] if fails != "until the end" else []
    assert sent == ["train 3", "train 4", "validation 4", *more]
    assert opened[-1].ends == [True]
    (record,) = [record for record in caplog.records if "must not end a run" in record.getMessage()]
    assert "FileNotFoundError" in record.getMessage()


def test_a_run_that_ends_without_its_end_is_recorded_as_stopped(tmp_path):
    """Python's exit closes a logger that no one has closed."""
    program = f"""
import sys
sys.path[:0] = {[str(WORKER.parent), str(WORKER.parents[2])]!r}
from pathlib import Path
from grr.training.loggers import Sender, Line
class Printed:
    held = {{}}
    def write(self, line): print("wrote", line.step)
    def close(self, *, finished): print("finished", finished)
Sender("printed", Printed).send(Line("train", 1, {{}}))
sys.exit(143)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (143, "wrote 1\nfinished False\n")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_missing_package_is_named_with_its_extra(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[tool][-1], None)
    monkeypatch.setattr(loggers, "PACKAGES", {tool: PACKAGES[tool][-1:]})
    with pytest.raises(ImportError, match=rf'names {tool}.* pip install "grr-coca\[{tool}\]"'):
        check_loggers([tool])


def test_a_folder_named_as_a_package_is_not_the_package(tmp_path, monkeypatch):
    """wandb's own folder in the working directory can be imported, as a namespace."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ImportError, match="wandb"):
        check_loggers(["wandb"])


def test_a_logger_is_named_once():
    need("tensorboard")
    with pytest.raises(ValueError, match="each logger once, got tensorboard, tensorboard"):
        check_loggers(["tensorboard", "tensorboard"])


def test_every_logger_has_an_extra_of_its_name():
    import tomllib

    extras = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    for name, packages in PACKAGES.items():
        named = " ".join(extras["optional-dependencies"][name]).replace("mlflow-skinny", "mlflow")
        assert all(package in named for package in packages)


def test_nothing_is_imported_before_a_logger_is_opened():
    program = f"import sys, grr.training.log; print([tool for tool in {TOOLS} if tool in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_pictures_go_to_loggers_and_not_to_the_log(tmp_path):
    MetricsLog(tmp_path).write("validation", 1, [(torch.zeros(3, 2, 2, dtype=torch.uint8), "text")], loss=1.0)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"split": "validation", "step": 1, "loss": 1.0}
