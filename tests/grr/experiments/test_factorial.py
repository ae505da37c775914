"""A factorial analysis finds the effects that values were made of, and only in complete designs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.experiments.factorial import effects, factors
from grr.experiments.runs import RunRecord
from grr.experiments.statistics import paired

pytest.importorskip("scipy", reason='pip install "grr-coca[compare]"')
FACTORS = {"norm": ("layernorm", "rmsnorm"), "feed_forward": ("mlp", "geglu"), "position": ("sines", "rope")}
number = st.floats(-10, 10)


def record(model: dict, seed: int = 0) -> RunRecord:
    return RunRecord(Path("x"), seed, True, model, {}, {}, [], None, {})


def design(names: list[str], order=None) -> dict[str, list[RunRecord]]:
    models = [dict(zip(names, c, strict=True)) for c in itertools.product(*(FACTORS[n] for n in names))]
    rows = [models[0], *(models[1:] if order is None else [models[1:][i] for i in order])]
    return {str(i): [record({"name": f"builder_{i}", "dim": 64, **row})] for i, row in enumerate(rows)}


@given(
    seeds=st.integers(2, 4),
    coefficients=st.lists(number, min_size=8, max_size=8),
    noise=st.lists(number, min_size=4, max_size=4),
    order=st.permutations(range(7)),
)
def test_the_effects_are_the_coefficients_that_the_values_are_made_of(seeds, coefficients, noise, order):
    """value = sum over subsets of coefficient * product of levels (0 or 1 centred at 1/2), plus that of the seed."""
    models = design(list(FACTORS), order)
    subsets = [s for size in range(4) for s in itertools.combinations(range(3), size)]
    made = dict(zip(subsets, coefficients, strict=True))
    rows = [[runs[0].model[n] == FACTORS[n][1] for n in FACTORS] for runs in models.values()]
    plain = [sum(c * np.prod([row[i] - 0.5 for i in s]) for s, c in made.items()) for row in rows]
    values = [{seed: value + noise[seed] for seed in range(seeds)} for value in plain]
    found = effects(models, values)
    assert len(found) == 7
    for effect in found:
        subset = tuple(list(FACTORS).index(factor.key) for factor in effect.factors)
        assert effect.difference.mean == pytest.approx(made[subset], abs=1e-9)
        assert effect.difference.pairs == seeds


@given(values=st.lists(st.lists(number, min_size=3, max_size=3), min_size=4, max_size=4))
def test_of_two_changes_effects_are_means_of_differences_and_the_interaction_is_their_difference(values):
    models = design(["norm", "position"])
    (a, b, c, d) = (np.array(x) for x in values)  # neither, position, norm, both
    by_seed = [dict(enumerate(x)) for x in (a, b, c, d)]
    norm, position, both = (effect.difference for effect in effects(models, by_seed))
    for found, expected in (
        (norm, ((c - a) + (d - b)) / 2),
        (position, ((b - a) + (d - c)) / 2),
        (both, (d - c) - (b - a)),
    ):
        assert (found.mean, found.error) == pytest.approx(paired(expected.tolist())[:2], abs=1e-9)


def test_only_seeds_that_all_models_have_count():
    values = [{0: 1.0, 1: 2.0, 2: 50.0}, {0: 2.0, 1: 4.0}, {0: 0.0, 1: 0.0, 3: 9.0}, {0: 1.0, 1: 1.0}]
    norm, position, _ = effects(design(["norm", "position"]), values)
    assert (norm.difference.mean, norm.difference.pairs) == (pytest.approx(-1.75), 2)
    assert position.difference.mean == pytest.approx(1.25)
    assert effects(design(["norm", "position"]), [{0: 1.0}, {0: 1.0}, {0: 1.0}, {0: 1.0}]) == []


@pytest.mark.parametrize("fault", ["missing", "twice", "third value", "one factor", "another argument"])
def test_incomplete_designs_have_no_effects(fault):
    models = design(["norm"] if fault == "one factor" else list(FACTORS))
    if fault == "missing":
        models.popitem()
    if fault == "twice":
        models["7"][0].model.update(models["6"][0].model)
    if fault == "third value":
        models["7"][0].model["position"] = "rope_2d"
    if fault == "another argument":
        models["7"][0].model["dim"] = 128
    assert factors(models) == []
    assert effects(models, [{0: 1.0, 1: 2.0}] * len(models)) == []
