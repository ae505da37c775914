"""Ranges of the numbers that configs hold, by `section.key`, so that one out of range is refused before anything is
read or built."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Range(NamedTuple):
    """Rule of a number."""

    rule: str  # a clause that follows "must be"
    holds: Callable[[float], bool]


def at_least(lowest: int) -> Range:
    return Range(f"at least {lowest}", lambda x: lowest <= x < math.inf)


ABOVE_ZERO = Range("above 0 and finite", lambda x: 0 < x < math.inf)
FRACTION = Range("from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_ONE = Range("from 0 to below 1", lambda x: 0 <= x < 1)
NONZERO_FRACTION = Range("above 0 and at most 1", lambda x: 0 < x <= 1)

RANGES = {
    "run.epochs": at_least(1),
    "run.max_steps": at_least(1),
    "run.patch_dropout_epochs": at_least(0),
    "run.batch_size": at_least(1),
    "run.batch_sizes": at_least(1),
    "run.micro_batch_size": at_least(1),
    "run.max_grad_norm": ABOVE_ZERO,
    "run.log_every": at_least(1),
    "run.validate_every": at_least(1),
    "run.patience": at_least(1),
    "run.num_eval_images": at_least(2),
    "run.num_beams": at_least(1),
    "run.iterations": at_least(1),
    "run.warmup": at_least(0),
    "run.ema_decay": BELOW_ONE,
    "run.wise_ft_alpha": FRACTION,
    "model.dropout": FRACTION,
    "model.patch_dropout": BELOW_ONE,
    "loader.workers": at_least(0),
    "loader.prefetch": at_least(1),
    "loader.block": at_least(1),
    "loader.max_bad_fraction": FRACTION,
    "augment.crop_area": NONZERO_FRACTION,
    "augment.flip": FRACTION,
    "augment.color_jitter": FRACTION,
    "loss.label_smoothing": FRACTION,
    "tuning.rank": at_least(1),
    "tuning.alpha": ABOVE_ZERO,
    "tuning.dropout": BELOW_ONE,
    "optimizer.lr": ABOVE_ZERO,
    "optimizer.betas": BELOW_ONE,
    "optimizer.weight_decay": at_least(0),
    "optimizer.eps": at_least(0),
    "optimizer.layer_decay": NONZERO_FRACTION,
    "schedule.warmup_steps": at_least(0),
    "schedule.cycle_epochs": ABOVE_ZERO,
    "control.patience": at_least(1),
    "control.regimes": at_least(1),
    "control.factor": at_least(1),
    "parallel.dp_replicate": at_least(1),
    "saving.every": at_least(1),
    "saving.minutes": ABOVE_ZERO,
    "saving.keep": at_least(1),
    "generation.max_new_tokens": at_least(1),
    "generation.min_new_tokens": at_least(0),
    "generation.num_beams": at_least(1),
    "generation.temperature": at_least(0),
    "generation.top_k": at_least(1),
    "generation.top_p": NONZERO_FRACTION,
    "generation.repetition_penalty": ABOVE_ZERO,
    "generation.no_repeat_ngram_size": at_least(0),
}


def out_of_range(name: str, value: object) -> str | None:
    """Returns the rule that a number, or one of a list, breaks, with the value, as text; None if none is broken."""
    numbers = value if isinstance(value, list | tuple) else (value,)
    if name not in RANGES or all(not isinstance(x, int | float) or RANGES[name].holds(x) for x in numbers):
        return None
    return f"must be {RANGES[name].rule}, got {list(value) if isinstance(value, tuple) else value}"
