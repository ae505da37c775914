"""What the seed alone would do to a number, and whether a difference between two models is more than that."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

LEVEL = 0.05  # a difference of at least this size would come by chance in one of twenty comparisons


class Spread(NamedTuple):
    """A number over the seeds of one model."""

    mean: float
    deviation: float | None  # standard deviation of one run; None for a single run
    runs: int


class Difference(NamedTuple):
    """A number of one model less that of another."""

    mean: float
    error: float | None  # standard error of the mean; None where no spread is known
    p: float | None  # probability of a mean at least this far from zero, were there none (t-test, two-sided)
    pairs: int  # runs of equal seed; 0 where too few seeds are equal, so that all runs are taken

    @property
    def beyond_spread(self) -> bool | None:
        """Whether the 95 % interval of the mean excludes zero; None where no spread is known."""
        return None if self.p is None else self.p < LEVEL


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one number."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Values of one model by seed, less those of another: paired over the seeds that both have.

    A pair shares its data order and the weights that both models have, so much of the spread cancels. With fewer than
    two equal seeds the means of all runs are compared (Welch 1947, degrees of freedom rounded down); with a single run
    on one side there is no spread to compare with. Both hold at least one value.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if len(seeds) > 1:
        mean, deviation, n = spread([values[seed] - baseline[seed] for seed in seeds])
        assert deviation is not None
        return _tested(mean, deviation / math.sqrt(n), n - 1, pairs=n)
    ours, theirs = spread(list(values.values())), spread(list(baseline.values()))
    if ours.deviation is None or theirs.deviation is None:
        if seeds:
            return Difference(values[seeds[0]] - baseline[seeds[0]], None, None, 1)
        return Difference(ours.mean - theirs.mean, None, None, 0)
    a, b = ours.deviation**2 / ours.runs, theirs.deviation**2 / theirs.runs
    freedom = (a + b) ** 2 / (a**2 / (ours.runs - 1) + b**2 / (theirs.runs - 1)) if a + b else 1
    return _tested(ours.mean - theirs.mean, math.sqrt(a + b), max(1, int(freedom)), pairs=0)


def two_sided_p(t: float, freedom: int) -> float:
    """Returns the probability that Student's t with these degrees of freedom is at least this far from zero.

    Raises ImportError without SciPy.
    """
    try:
        from scipy.special import stdtr
    except ImportError as error:
        raise ImportError(
            'two_sided_p: comparing models needs SciPy, which is not installed; pip install "grr-coca[compare]"'
        ) from error
    return float(2 * stdtr(freedom, -abs(t)))


def _tested(mean: float, error: float, freedom: int, *, pairs: int) -> Difference:
    if error == 0:  # the same difference for every seed
        return Difference(mean, error, 0.0 if mean else 1.0, pairs)
    return Difference(mean, error, two_sided_p(mean / error, freedom), pairs)
