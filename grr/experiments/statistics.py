"""What the seed alone would do to a number, and whether a difference between two models is more than that."""

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

MAX_EXACT = 16  # differences whose signs are flipped in all ways
MIN_FLIPPED = 6  # differences from which on a test of the signs can have a p below 0.05
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
    interval: tuple[float, float] | None = None  # 95 % interval of the mean; None where no spread is known
    sign_flip_p: float | None = None  # of `sign_flip_p`; None for fewer than MIN_FLIPPED pairs

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
        return paired([values[seed] - baseline[seed] for seed in seeds])
    ours, theirs = spread(list(values.values())), spread(list(baseline.values()))
    if ours.deviation is None or theirs.deviation is None:
        if seeds:
            return Difference(values[seeds[0]] - baseline[seeds[0]], None, None, 1)
        return Difference(ours.mean - theirs.mean, None, None, 0)
    a, b = ours.deviation**2 / ours.runs, theirs.deviation**2 / theirs.runs
    freedom = (a + b) ** 2 / (a**2 / (ours.runs - 1) + b**2 / (theirs.runs - 1)) if a + b else 1
    return _tested(ours.mean - theirs.mean, math.sqrt(a + b), max(1, int(freedom)), pairs=0)


def paired(differences: Sequence[float]) -> Difference:
    """Returns the mean of at least two differences, one for each seed, with its tests."""
    mean, deviation, n = spread(differences)
    assert deviation is not None
    tested = _tested(mean, deviation / math.sqrt(n), n - 1, pairs=n)
    return tested._replace(sign_flip_p=sign_flip_p(differences) if n >= MIN_FLIPPED else None)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p of a permutation test: the fraction of the flips of the signs of some differences whose
    mean is at least as far from zero as theirs.

    It assumes that without an effect a difference and its negative are equally likely, and no distribution. The lowest
    value of n differences is 2 / 2^n. All flips are counted up to 16 differences, and 2^16 drawn ones beyond. Source:
    Fisher 1935, chapter 3.
    """
    values = np.array(differences, dtype=np.float64)
    n = len(values)
    if n <= MAX_EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=n)))  # [2^n, n], the first row all 1
    else:
        drawn = np.random.default_rng(0).choice((1, -1), size=(2**MAX_EXACT - 1, n))
        signs = np.concatenate([np.ones((1, n), dtype=np.int64), drawn])
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= sums[0] * (1 - 1e-12)))


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p values corrected for their number, in their order: those below a level keep the probability of one or
    more false ones among all below that level. Source: Holm 1979."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def two_sided_p(t: float, freedom: int) -> float:
    """Returns the probability that Student's t with these degrees of freedom is at least this far from zero.

    Raises ImportError without SciPy.
    """
    return float(2 * _special().stdtr(freedom, -abs(t)))


def student_quantile(p: float, freedom: int) -> float:
    """Returns the number below which Student's t with these degrees of freedom is with probability p.

    Raises ImportError without SciPy.
    """
    return float(_special().stdtrit(freedom, p))


def _special() -> Any:
    try:
        import scipy.special
    except ImportError as error:
        raise ImportError(
            'statistics: comparing models needs SciPy, which is not installed; pip install "grr-coca[compare]"'
        ) from error
    return scipy.special


def _tested(mean: float, error: float, freedom: int, *, pairs: int) -> Difference:
    if error == 0:  # the same difference for every seed
        return Difference(mean, error, 0.0 if mean else 1.0, pairs, (mean, mean))
    half = student_quantile(1 - LEVEL / 2, freedom) * error
    return Difference(mean, error, two_sided_p(mean / error, freedom), pairs, (mean - half, mean + half))
