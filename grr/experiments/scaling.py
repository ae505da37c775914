"""Scaling laws: how a loss falls with the parameters of the model and the number of samples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grr.experiments.metrics import Metric, values
from grr.experiments.runs import RunRecord
from grr.experiments.statistics import LEVEL, student_quantile

MIN_RUNS = 4  # three numbers are fitted


class Exponent(NamedTuple):
    """Exponent of a power law with its 95 % interval."""

    value: float
    low: float
    high: float


class ScalingLaw(NamedTuple):
    """Fit of loss = constant * parameters ** -by_size * samples ** -by_samples."""

    constant: float
    by_size: Exponent
    by_samples: Exponent
    runs: int
    residual: float  # standard deviation of the logarithm of the loss around the law


def scaling_points(runs: Sequence[RunRecord], metric: Metric) -> list[tuple[int, int, float]]:
    """Returns for each run that has the metric its parameters, its training samples, and the value."""
    return [
        (run.start["parameters"], run.validations[-1]["step"] * run.start["batch_size"], value)
        for run in runs
        for value in values([run], metric).values()
    ]


def scaling_law(runs: Sequence[RunRecord], metric: Metric, name: str = "runs") -> ScalingLaw:
    """Fit a power law in two variables to runs of several sizes, by least squares of the logarithms.

    Parameters are those of the manifest; samples are optimizer steps times pairs of a step. Intervals are those of the
    linear model with independent errors of equal size (Student's t). Without a term for the lowest possible loss the
    exponents hold for the sizes that were run. name: of the runs, for messages. Source: Kaplan et al. 2020, section
    1.2, as a product of both laws. Raises ValueError if fewer than four runs have the metric, a value is not positive,
    or all sizes, or all numbers of samples, are equal.
    """
    points = scaling_points(runs, metric)
    if len(points) < MIN_RUNS or any(value <= 0 for *_, value in points):
        raise ValueError(
            f"scaling_law: {name}: there must be at least {MIN_RUNS} runs with a positive {metric.label}, "
            f"got {len(points)}; add runs of other sizes"
        )
    sizes, samples, losses = (np.log(np.array(x, dtype=np.float64)) for x in zip(*points, strict=True))
    if len(set(sizes)) == 1 or len(set(samples)) == 1:
        raise ValueError(f"scaling_law: {name}: runs must differ in parameters and in samples; add other sizes")
    design = np.stack([np.ones_like(sizes), -sizes, -samples], axis=1)  # [n, 3]
    solution, *_ = np.linalg.lstsq(design, losses, rcond=None)
    residuals = losses - design @ solution
    freedom = len(points) - design.shape[1]
    variance = residuals @ residuals / freedom
    errors = np.sqrt(np.diag(variance * np.linalg.inv(design.T @ design)))
    half = student_quantile(1 - LEVEL / 2, freedom) * errors
    exponents = [Exponent(*map(float, (b, b - h, b + h))) for b, h in zip(solution, half, strict=True)]
    return ScalingLaw(math.exp(solution[0]), exponents[1], exponents[2], len(points), math.sqrt(variance))
