"""Factorial analysis: what each of several changes does, and how much it depends on the others."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grr.experiments.runs import RunRecord
from grr.experiments.statistics import Difference, paired


class Factor(NamedTuple):
    """Argument of the builder with two values among some models."""

    key: str
    baseline: Any
    changed: Any


class Effect(NamedTuple):
    """Effect of one change, averaged over all combinations of the others; or of several, their interaction."""

    factors: tuple[Factor, ...]
    difference: Difference


def factors(models: Mapping[str, Sequence[RunRecord]]) -> list[Factor]:
    """Returns the arguments in which models differ, if these are all combinations of two or more arguments with two
    values each; otherwise an empty list. The first model has the baseline's values."""
    arguments = [{k: v for k, v in runs[0].model.items() if k != "name"} for runs in models.values()]
    keys = [k for k in arguments[0] if len({str(model.get(k)) for model in arguments}) > 1]
    found = []
    for key in keys:
        baseline, changed = arguments[0][key], {str(m.get(key)): m.get(key) for m in arguments}
        changed.pop(str(baseline))
        found.append(Factor(key, baseline, next(iter(changed.values()))))
    combinations = {tuple(str(model.get(key)) for key in keys) for model in arguments}
    two_each = all(len({str(model.get(key)) for model in arguments}) == 2 for key in keys)
    complete = len(models) == len(combinations) == 2 ** len(keys) and two_each and len(keys) > 1
    return found if complete else []


def effects(models: Mapping[str, Sequence[RunRecord]], values: Sequence[Mapping[int, float]]) -> list[Effect]:
    """Compute the effects of all changes and of their interactions, over the seeds that all models have.

    values: of each model, by seed. For one change it is the mean over the combinations of the others of the value with
    the change less that without; for two, how much larger the effect of the one is with the other than without; and so
    on. Each is computed for each seed, and these are the differences that are tested. Source: Fisher 1935, chapter 6;
    Yates 1937. Empty if the models are not a factorial design (`factors`), or have fewer than two seeds in common.
    """
    changes = factors(models)
    seeds = sorted(set.intersection(*(set(of_model) for of_model in values)))
    if not changes or len(seeds) < 2:
        return []
    levels = [
        [1 if str(runs[0].model.get(f.key)) != str(f.baseline) else -1 for f in changes] for runs in models.values()
    ]
    result = []
    for size in range(1, len(changes) + 1):
        for chosen in itertools.combinations(range(len(changes)), size):
            signs = [math.prod(level[i] for i in chosen) for level in levels]
            terms = len(levels) / 2**size
            of_seed = [
                sum(sign * of_model[seed] for sign, of_model in zip(signs, values, strict=True)) / terms
                for seed in seeds
            ]
            result.append(Effect(tuple(changes[i] for i in chosen), paired(of_seed)))
    return result
