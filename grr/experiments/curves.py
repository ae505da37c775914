"""Learning curves: the step at which a run reaches the end of another."""

from collections.abc import Sequence

from grr.experiments.runs import RunRecord
from grr.training.log import LogLine, is_number


def step_reaching(validations: Sequence[LogLine], key: str, level: float) -> float | None:
    """Returns the step at which a value that falls is first at most `level`, None if it never is.

    Between two validations the value is taken to be linear in the step.
    """
    before: tuple[float, float] | None = None
    for step, value in ((float(row["step"]), float(row[key])) for row in validations if is_number(row.get(key))):
        if value <= level:
            if before is None:
                return step
            last, above = before
            return last + (step - last) * (above - level) / (above - value)
        before = step, value
    return None


def steps_to_end_of(runs: Sequence[RunRecord], others: Sequence[RunRecord], key: str) -> list[float | None]:
    """Returns the step at which a model is where another ends, for each seed that both have; None if it never is."""
    ends = {run.seed: float(run.best[key]) for run in others if is_number(run.best.get(key))}
    return [step_reaching(run.validations, key, ends[run.seed]) for run in runs if run.seed in ends]
