"""Ranges of the options that the recipes share."""

import math
from typing import Any

AT_LEAST = {
    "epochs": 1,
    "max_steps": 1,
    "batch_size": 1,
    "micro_batch_size": 1,
    "dp_replicate": 1,
    "log_every": 1,
    "validate_every": 1,
    "save_every": 1,
    "keep": 1,
    "patience": 1,
    "num_eval_images": 2,
}
ABOVE_ZERO = ("max_grad_norm", "save_minutes")
FRACTIONS = ("ema_decay", "wise_ft_alpha")


def check_ranges(run: Any) -> None:
    """Raise ValueError naming every option of a recipe's `Run` that is out of its range; None is never out of it."""
    wrong = []
    for name, value in vars(run).items():
        if value is None:
            continue
        if name in AT_LEAST and value < AT_LEAST[name]:
            wrong.append(f"{name} must be at least {AT_LEAST[name]}, got {value}")
        if name in ABOVE_ZERO and not 0 < value < math.inf:
            wrong.append(f"{name} must be above 0 and finite, got {value}")
        if name in FRACTIONS and not 0 <= value <= 1:
            wrong.append(f"{name} must be from 0 to 1, got {value}")
    if wrong:
        raise ValueError("; ".join(wrong))
