"""Every gradient of a step in float64 is that of one formula, for any processes, micro-batches and dropout."""

import json
from pathlib import Path

import pytest
from gradients_worker import CASES, PAIRS, measured
from programs import run

WORKER = Path(__file__).parent / "gradients_worker.py"


LEARNED = [case for case in CASES if case["learned"] and case["dropout"]]


def assert_exact(rows: list[dict], processes: int, chosen: list[dict] = CASES) -> None:
    sizes = [size for size in (1, 2, 4, 8, 16) if size * processes <= PAIRS]
    cases = [case | {"micro_batch_size": size} for case in chosen for size in sizes]
    cases = [case for case in cases if case["negatives"] == "global" or case["micro_batch_size"] > 1]
    key = lambda row: tuple(map(str, (row[name] for name in cases[0])))  # noqa: E731
    assert sorted(map(key, rows)) == sorted(map(key, cases))
    for row in rows:
        assert row["losses"] < 1e-13, row
        assert row["gradients"] < 1e-12, row


@pytest.mark.usefixtures("process_group")
def test_gradients_of_one_process_are_those_of_the_formulas_for_any_micro_batch_size():
    assert_exact(measured(), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (2, {}),
        (4, {"cases": LEARNED}),
        (2, {"cases": LEARNED, "keep_gathered": False}),
        (4, {"cases": LEARNED, "keep_gathered": True, "dp_replicate": 2}),
    ],
)
def test_gradients_of_many_processes_are_those_of_the_formulas_for_any_micro_batch_size(processes, arguments):
    done = run([str(WORKER), json.dumps(arguments)], processes=processes, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    assert_exact(json.loads(lines[0].removeprefix("RESULT ")), processes, arguments.get("cases", CASES))
