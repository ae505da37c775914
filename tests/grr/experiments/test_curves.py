"""The step at which a run reaches the end of another is on its curve, and no earlier validation is as low."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.experiments.curves import step_reaching

value = st.floats(0.01, 10)


@given(losses=st.lists(value, min_size=1, max_size=8), level=value)
def test_the_curve_is_at_the_level_at_that_step_and_above_it_before(losses, level):
    steps = [100 * i for i in range(1, len(losses) + 1)]
    found = step_reaching([{"step": s, "loss": x} for s, x in zip(steps, losses, strict=True)], "loss", level)
    if found is None:
        assert min(losses) > level
        return
    at = np.interp(found, steps, losses)
    assert at <= level * (1 + 1e-9)
    assert at == pytest.approx(level) or found == steps[0]
    assert all(x > level for s, x in zip(steps, losses, strict=True) if s < found)


def test_lines_without_the_number_are_passed_over():
    rows = [{"step": 1, "loss": 3.0}, {"step": 2}, {"step": 3, "loss": float("nan")}, {"step": 5, "loss": 1.0}]
    assert step_reaching(rows, "loss", 2.0) == 3.0
    assert step_reaching(rows, "other", 2.0) is None
