"""A fitted scaling law is the one that the losses were made of, and its intervals hold it as often as they say."""

import itertools
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.experiments.metrics import metric
from grr.experiments.runs import RunRecord
from grr.experiments.scaling import scaling_law, scaling_points
from grr.reports.figures import BOTTOM, TOP
from grr.reports.scaling import scaling_figure, scaling_table

pytest.importorskip("scipy", reason='pip install "grr-coca[compare]"')
SIZES, STEPS, BATCH = (1000, 8000, 50_000), (100, 400, 1000), 64
CAPTIONING = metric("captioning_loss")


def record(size: int, steps: int, loss: float) -> RunRecord:
    rows = [
        {"step": steps // 2, "captioning_loss": 9.0, "loss": 9.0},
        {"step": steps, "captioning_loss": loss, "loss": 1.0},
    ]
    start = {"parameters": size, "batch_size": BATCH}
    return RunRecord(Path("x"), 0, True, {}, {}, start, rows, rows[-1], {})


def made(constant: float, by_size: float, by_samples: float, noise: np.ndarray) -> list[RunRecord]:
    grid = itertools.product(SIZES, STEPS)
    return [
        record(n, s, constant * n**-by_size * (s * BATCH) ** -by_samples * math.exp(e))
        for (n, s), e in zip(grid, noise, strict=True)
    ]


@given(constant=st.floats(0.1, 100), by_size=st.floats(-0.5, 0.5), by_samples=st.floats(-0.5, 0.5))
def test_losses_of_a_law_give_that_law(constant, by_size, by_samples):
    law = scaling_law(made(constant, by_size, by_samples, np.zeros(9)), CAPTIONING)
    assert law.constant == pytest.approx(constant, rel=1e-6)
    assert (law.by_size.value, law.by_samples.value) == pytest.approx((by_size, by_samples), abs=1e-9)
    assert law.runs == 9
    assert law.residual == pytest.approx(0, abs=1e-9)


def test_intervals_hold_the_exponents_in_nineteen_of_twenty_studies():
    rng = np.random.default_rng(0)
    laws = [scaling_law(made(3, 0.1, 0.2, rng.normal(0, 0.1, 9)), CAPTIONING) for _ in range(1000)]
    for exponents, true in (([x.by_size for x in laws], 0.1), ([x.by_samples for x in laws], 0.2)):
        assert 0.93 < np.mean([x.low <= true <= x.high for x in exponents]) < 0.97
    assert np.mean([x.residual for x in laws]) == pytest.approx(0.1, abs=0.01)


def test_table_and_figure_show_every_group_and_run():
    rng = np.random.default_rng(0)
    groups = {"<base>": made(3, 0.1, 0.2, rng.normal(0, 0.1, 9)), "grr": made(2, 0.1, 0.3, rng.normal(0, 0.1, 9))}
    laws = {name: scaling_law(runs, CAPTIONING) for name, runs in groups.items()}
    points = {name: scaling_points(runs, CAPTIONING) for name, runs in groups.items()}
    table = scaling_table(laws)
    assert [row[:2] for row in table[1:]] == [["<base>", "9"], ["grr", "9"]]
    assert table[2][3].startswith(f"{laws['grr'].by_samples.value:.3f} [")
    root = ElementTree.fromstring(scaling_figure(points, laws, "captioning loss"))
    svg = "{http://www.w3.org/2000/svg}"
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{svg}circle")]
    every = [(n, loss) for of_group in points.values() for _, n, loss in of_group]
    for axis, sign in ((0, 1), (1, -1)):
        shown, expected = ([math.log(p[axis]) if k else p[axis] for p in some] for k, some in enumerate((dots, every)))
        assert np.corrcoef(shown, expected)[0, 1] == pytest.approx(sign, abs=1e-3)
    assert "<base>" in "".join(root.itertext())


def test_the_lines_of_a_law_are_within_the_figure_where_runs_deviate_from_it():
    runs = made(3, 1.0, 1.0, np.array([-0.5, 0, 0, 0, 0, 0, 0, 0, 0.5]))  # the corners deviate toward the others
    law, points = scaling_law(runs, CAPTIONING), scaling_points(runs, CAPTIONING)
    root = ElementTree.fromstring(scaling_figure({"mine": points}, {"mine": law}, "captioning loss"))
    lines = [p.get("d") for p in root.iter("{http://www.w3.org/2000/svg}path") if "thick" in p.get("class")]
    heights = [float(point.split()[1]) for d in lines for point in d.removeprefix("M").split("L") if "h" not in point]
    assert len(heights) == 6
    assert min(heights) >= TOP
    assert max(heights) <= BOTTOM


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([record(1000, 100, 1.0)] * 3, "at least 4 runs with a positive captioning loss, got 3"),
        ([record(1000, s, 1.0) for s in (1, 2, 3, 4)], "must differ in parameters and in samples"),
        ([record(n, 100, 1.0) for n in (1, 2, 3, 4)], "must differ in parameters and in samples"),
        ([record(n, n, 0.0) for n in (1, 2, 3, 4)], "with a positive captioning loss"),
    ],
)
def test_runs_that_do_not_determine_a_law_are_refused(runs, message):
    with pytest.raises(ValueError, match=f"scaling_law: mine: .*{message}"):
        scaling_law(runs, CAPTIONING, "mine")
