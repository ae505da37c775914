"""Ranges of the options that recipes share, by `section.key`."""

import math

AT_LEAST = {
    "run.epochs": 1,
    "run.max_steps": 1,
    "run.patch_dropout_epochs": 0,
    "run.batch_size": 1,
    "run.micro_batch_size": 1,
    "run.log_every": 1,
    "run.validate_every": 1,
    "run.patience": 1,
    "run.num_eval_images": 2,
    "parallel.dp_replicate": 1,
    "saving.every": 1,
    "saving.keep": 1,
}
ABOVE_ZERO = ("run.max_grad_norm", "saving.minutes")
FRACTIONS = ("run.ema_decay", "run.wise_ft_alpha")


def out_of_range(name: str, value: object) -> str | None:
    """Returns the rule that a number breaks, with the number, as text; None if it breaks none."""
    if not isinstance(value, int | float):
        return None
    if name in AT_LEAST and value < AT_LEAST[name]:
        return f"must be at least {AT_LEAST[name]}, got {value}"
    if name in ABOVE_ZERO and not 0 < value < math.inf:
        return f"must be above 0 and finite, got {value}"
    if name in FRACTIONS and not 0 <= value <= 1:
        return f"must be from 0 to 1, got {value}"
    return None
