"""The command scale: a column for each number of GPUs that divides the batch, and a reason for each that does not."""

import pytest

from grr.cli import main

TINY = ["scale", "pretrain/openmoji", "run.batch_size=64", "run.micro_batch_size=16", "model.dim=32"]


def test_a_number_of_gpus_that_divides_the_batch_has_a_column_and_others_a_reason(capsys):
    assert main([*TINY, "--gpus", "1,2,3", "--pairs", "2e6", "assume.tflops=1", "parallel.keep_gathered=true"]) == 0
    out = capsys.readouterr().out
    lines = {line[:38].strip(): line[38:].split("  ") for line in out.splitlines()}
    rows = {name: [cell.strip() for cell in cells if cell.strip()] for name, cells in lines.items()}
    assert rows["GPUs"] == ["1", "2"]
    assert rows["pairs a GPU = micro-batches x pairs"] == ["64 = 4 x 16", "32 = 2 x 16"]
    one, two = (float(cell) for cell in rows["seconds of computing"])
    assert one == pytest.approx(2 * two, rel=0.01)
    assert rows["MB sent: weights"][0] == "-"
    assert "hours an epoch of 2 M pairs" in rows
    assert "3 GPUs: scale: batch_size must be a multiple of GPUs * micro_batch_size" in out
    assert "  tflops: 1.0  # float, default 989.0: of a GPU in matrix products, at best" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scale", "evaluate/coco"], "which has no section loss, parallel"),
        ([*TINY, "assume.tflops=0"], "assumptions must be above 0, got {'tflops': 0.0}"),
        ([*TINY, "assume.tflop=1"], "did you mean tflops?"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_the_value(words, message, capsys):
    assert main(words) in (1, 2)
    assert message in capsys.readouterr().err
