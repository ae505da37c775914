"""The captions of a run's validations: kept through kills and resumes, each validation once."""

import json
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.evaluation.examples import Caption, Examples
from grr.reports.history import show_history
from grr.reports.training import write_report

IMAGE = torch.zeros(3, 8, 8, dtype=torch.uint8)


def written(*captions: str) -> Examples:
    shown = [Caption(IMAGE, caption, ["a fox"], name=f"{i}.png") for i, caption in enumerate(captions)]
    return Examples([], shown, distinct_captions=len(set(captions)), written_captions=len(captions))


def validate(folder: Path, rows: list[dict], step: int, *captions: str, split: str = "validation", **row: int) -> str:
    """What a recipe does after a validation: a line of the log, then the report. The column heads of its table."""
    rows.append({"split": split, "step": step, "loss": 1.0, **row})
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    write_report(folder, title="a run", examples=written(*captions))
    return show_history(folder, rows, written(*captions).captions)


def steps(folder: Path) -> list[tuple[int, str]]:
    lines = map(json.loads, folder.joinpath("examples.jsonl").read_text().splitlines())
    return [(line["step"], line["captions"]["0.png"]) for line in lines]


@given(
    saved=st.integers(0, 4),
    killed=st.integers(1, 6),
)
def test_a_resumed_run_has_the_captions_of_the_uninterrupted_one(tmp_path_factory, saved, killed):
    whole, resumed = (tmp_path_factory.mktemp("run") for _ in range(2))
    rows: list[dict] = []
    for step in range(1, 7):
        table = validate(whole, rows, step, f"caption {step}")
    rows = []
    for step in range(1, killed + 1):
        validate(resumed, rows, step, f"caption {step}")
    with resumed.joinpath("examples.jsonl").open("a") as file:
        file.write('{"step": 9, "capt')  # a kill tore the line
    rows = [row for row in rows if row["step"] <= min(saved, killed)]  # the log drops what will be computed again
    for step in range(len(rows) + 1, 7):
        again = validate(resumed, rows, step, f"caption {step}")
    assert steps(resumed) == steps(whole) == [(step, f"caption {step}") for step in range(1, 7)]
    assert again == table


def test_a_validation_that_the_log_forgot_is_not_shown(tmp_path):
    rows: list[dict] = []
    for step in (10, 20, 30):
        validate(tmp_path, rows, step, f"caption {step}")
    table = show_history(tmp_path, rows[:2], written("x").captions)
    assert "caption 20" in table
    assert "caption 30" not in table


def test_the_table_is_the_captions_by_image_and_validation_with_the_count_of_distinct_ones(tmp_path):
    rows: list[dict] = []
    assert validate(tmp_path, rows, 10, "a", "a") == ""
    table = validate(tmp_path, rows, 20, "a <b>", "")
    heads = "<th scope=col>step 10<small>1 of 2 captions are distinct</small></th><th scope=col>step 20<small>2 of 2"
    assert heads in table
    cells = [row.partition("</th>")[2] for row in table.partition("<tbody>")[2].split("</tr>")[:2]]
    assert cells == [
        "<td>a</td><td>a &lt;b&gt;</td><td class=true>a fox</td>",
        "<td>a</td><td><i>(empty)</i></td><td class=true>a fox</td>",
    ]


def test_the_model_that_a_run_leaves_has_a_column_if_no_validation_had_its_captions(tmp_path):
    rows: list[dict] = []
    for step in (10, 20):
        validate(tmp_path, rows, step, f"caption {step}")
    assert "model/" not in validate(tmp_path, rows, 20, "caption 10", split="final", model_step=10)
    rows.pop()
    assert "model/" in validate(tmp_path, rows, 20, "another", split="final", model_step=10)
    assert steps(tmp_path) == [(10, "caption 10"), (20, "caption 20"), (20, "another")]


def test_many_validations_are_shown_by_six_the_first_and_the_last_among_them(tmp_path):
    rows: list[dict] = []
    for step in range(1, 101):
        table = validate(tmp_path, rows, step, str(step))
    assert table.count("<th scope=col>step ") == 6
    assert ">step 1<" in table
    assert ">step 100<" in table


def test_a_damaged_file_does_not_end_a_run(tmp_path):
    tmp_path.joinpath("examples.jsonl").write_bytes(b'\xff\n[]\n{"step": "x", "captions": {}}\n{"captions": 3}\n')
    assert validate(tmp_path, [], 10, "a") == ""
    assert steps(tmp_path) == [(10, "a")]
