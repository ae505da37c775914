"""Numbers are written line by line, survive a kill, and are not written twice by a run that resumes."""

import json

from hypothesis import given
from hypothesis import strategies as st

from grr.training.log import MetricsLog, read_metrics, write_manifest


@given(count=st.integers(0, 9), resumed=st.integers(0, 12), torn=st.integers(0, 40))
def test_a_resumed_log_holds_each_step_once_whatever_a_kill_left(tmp_path_factory, count, resumed, torn):
    folder = tmp_path_factory.mktemp("run")
    log = MetricsLog(folder)
    for step in range(1, count + 1):
        log.write("train", step, loss=1 / step)
    log.close()
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text()[: len(file.read_text()) - torn])
    kept = [line["step"] for line in read_metrics(folder)]
    assert kept == list(range(1, len(kept) + 1))
    log = MetricsLog(folder, step=resumed)
    log.write("train", resumed + 1, loss=0.0)
    assert [line["step"] for line in read_metrics(folder)] == [s for s in kept if s <= resumed] + [resumed + 1]


def test_the_end_of_a_run_stands_once_however_often_a_finished_run_is_started_again(tmp_path):
    for _ in range(3):
        log = MetricsLog(tmp_path, step=9)
        if not read_metrics(tmp_path):
            log.write("validation", 9, loss=2.0)
        log.write("final", 9, loss=1.0)
        log.close()
    assert [line["split"] for line in read_metrics(tmp_path)] == ["validation", "final"]


def test_numbers_that_json_has_no_word_for_become_null(tmp_path):
    MetricsLog(tmp_path).write("train", 1, loss=float("nan"), lr=float("inf"), grad_norm=2.0)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"split": "train", "step": 1, "loss": None, "lr": None, "grad_norm": 2.0}


def test_there_is_nothing_to_read_before_the_first_line(tmp_path):
    assert read_metrics(tmp_path) == []


def test_the_manifest_keeps_every_start_of_a_run(tmp_path):
    write_manifest(tmp_path, world_size=2)
    write_manifest(tmp_path, world_size=4)
    starts = json.loads((tmp_path / "manifest.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 4]
    assert {"time", "command", "versions", "commit", "host", "device"} <= set(starts[0])
