"""A difference is more than the seeds' doing as often as it is said to be, and no more often."""

import math
import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.experiments.statistics import difference, holm, paired, sign_flip_p, spread, two_sided_p

scipy_stats = pytest.importorskip("scipy.stats", reason='pip install "grr-coca[compare]"')
values = st.floats(-100, 100)
by_seed = st.dictionaries(st.integers(0, 9), values, min_size=1, max_size=6)


@given(numbers=st.lists(values, min_size=1, max_size=9))
def test_mean_and_standard_deviation_are_numpys(numbers):
    found = spread(numbers)
    assert found.mean == pytest.approx(np.mean(numbers), abs=1e-9)
    assert found.runs == len(numbers)
    if len(numbers) > 1:
        assert found.deviation == pytest.approx(np.std(numbers, ddof=1), abs=1e-6)
    else:
        assert found.deviation is None


@given(ours=by_seed, theirs=by_seed)
def test_exchanging_the_models_turns_the_sign_and_nothing_else(ours, theirs):
    one, other = difference(ours, theirs), difference(theirs, ours)
    assert one.mean == pytest.approx(-other.mean, abs=1e-9)
    assert (one.error is None) == (other.error is None)
    assert (one.pairs, one.error, one.p) == pytest.approx((other.pairs, other.error, other.p), nan_ok=True)


@given(pairs=st.lists(st.tuples(values, values), min_size=2, max_size=6), shifts=st.lists(values, min_size=6))
def test_what_a_seed_does_to_both_models_cancels(pairs, shifts):
    ours, theirs = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    moved = difference({s: x + shifts[s] for s, x in ours.items()}, {s: x + shifts[s] for s, x in theirs.items()})
    still = difference(ours, theirs)
    assert moved.pairs == still.pairs == len(pairs)
    assert (moved.mean, moved.error) == pytest.approx((still.mean, still.error), abs=1e-9)


@given(freedom=st.integers(1, 40), t=st.floats(0, 8))
def test_the_probability_is_the_area_under_students_density(freedom, t):
    inside = np.linspace(-t, t, 20_001)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = constant * (1 + inside**2 / freedom) ** (-(freedom + 1) / 2)
    assert two_sided_p(t, freedom) == pytest.approx(1 - np.trapezoid(density, inside), abs=1e-6)
    assert two_sided_p(-t, freedom) == two_sided_p(t, freedom)


@pytest.mark.parametrize(("shared", "runs"), [(True, 3), (True, 2), (False, 4)])
def test_equal_models_differ_beyond_the_spread_once_in_twenty_comparisons(shared, runs):
    rng = random.Random(0)
    seeds = range(runs), range(runs) if shared else range(10, 10 + runs)
    said = [difference(*({s: rng.gauss(0, 1) for s in side} for side in seeds)).beyond_spread for _ in range(4000)]
    assert 0.03 < sum(said) / len(said) < 0.065  # 5 %; Welch's rounded degrees of freedom say so a little less often


@given(numbers=st.lists(values.map(lambda x: round(x, 9)), min_size=2, max_size=9))  # SciPy's scale becomes 0 below
def test_the_interval_is_scipys_and_excludes_zero_where_the_difference_is_beyond_the_spread(numbers):
    found = paired(numbers)
    assert found.interval is not None
    if found.error:
        expected = scipy_stats.t.interval(0.95, len(numbers) - 1, loc=np.mean(numbers), scale=scipy_stats.sem(numbers))
        assert found.interval == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert found.beyond_spread == (not found.interval[0] <= 0 <= found.interval[1])
    else:
        assert found.interval == (found.mean, found.mean)


@given(numbers=st.lists(st.integers(-50, 50), min_size=2, max_size=9))
def test_flips_of_signs_are_those_of_scipys_permutation_test(numbers):
    expected = scipy_stats.permutation_test((numbers,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(numbers) == pytest.approx(expected.pvalue)
    assert sign_flip_p(numbers) >= 2 / 2 ** len(numbers) or not any(numbers)
    assert sign_flip_p([-x for x in numbers]) == sign_flip_p(numbers)


def test_flips_of_many_signs_are_drawn_and_agree_with_all_of_them():
    rng = np.random.default_rng(0)
    for n, shift in ((16, 0.3), (17, 0.3), (40, 0.2)):
        numbers = rng.normal(shift, 1, n)
        drawn = scipy_stats.permutation_test(
            (numbers,), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng
        )
        assert sign_flip_p(numbers) == pytest.approx(drawn.pvalue, abs=0.02)


@pytest.mark.parametrize("seeds", [6, 8])
def test_flips_of_signs_find_an_effect_that_does_not_exist_in_at_most_one_of_twenty_experiments(seeds):
    rng = np.random.default_rng(0)
    found = [sign_flip_p(rng.standard_t(2, seeds)) < 0.05 for _ in range(2000)]  # heavy tails
    assert 0.02 < np.mean(found) < 0.06
    assert paired([1.0] * 5 + [1.5]).sign_flip_p == 2 / 2**6
    assert paired([1.0] * 4).sign_flip_p is None  # 1/8 at the lowest


@given(ps=st.lists(st.floats(0, 1), max_size=7), level=st.floats(0.001, 0.999))
def test_holms_procedure_rejects_what_its_steps_reject(ps, level):
    rejected = set()
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[i] * (len(ps) - rank) > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(ps)) if p <= level} == rejected
    assert all(p <= q <= 1 for p, q in zip(ps, holm(ps), strict=True))


def test_a_difference_far_beyond_the_spread_is_seen():
    assert difference({0: 5.01, 1: 5.02, 2: 5.00}, {0: 5.43, 1: 5.45, 2: 5.44}).beyond_spread is True
    assert difference({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}).beyond_spread is True  # the same for every seed
    assert difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).beyond_spread is False


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs", "mean"),
    [
        ({0: 3.0}, {0: 1.0, 1: 5.0}, 1, 2.0),  # one seed in common, the other side has more
        ({7: 3.0}, {0: 1.0, 1: 5.0}, 0, 0.0),  # none in common
        ({0: 3.0}, {0: 1.0}, 1, 2.0),
    ],
)
def test_where_one_side_has_a_single_run_no_spread_is_claimed(ours, theirs, pairs, mean):
    found = difference(ours, theirs)
    assert (found.pairs, found.mean) == (pairs, mean)
    assert found.error is found.p is found.beyond_spread is None


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r'needs SciPy, which is not installed; pip install "grr-coca\[compare\]"'):
        two_sided_p(1.0, 2)
