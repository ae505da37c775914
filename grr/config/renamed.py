"""Keys of configs that were renamed, removed or added, so that an old config is understood or its error says what to
write instead."""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Removed(NamedTuple):
    """A key whose option no longer exists."""

    value: Any  # of the option, that the library now always has
    reason: str  # a clause that follows "it was removed:"


REMOVED = {
    "optimizer.moments": Removed("fp32", "the optimizer state is float32 (docs/what_did_not_help.md)"),
}

ADDED = {  # options that older versions did not have, with the value that changes nothing
    "model.patch_dropout": 0.0,
    "run.patch_dropout_epochs": None,
    "loader.block": None,
    "augment.crop_area": 1.0,
    "augment.flip": 0.0,
    "augment.color_jitter": 0.0,
    "tuning.frozen": [],
    "tuning.lora": [],
    "tuning.rank": 8,
    "tuning.alpha": 16.0,
    "tuning.dropout": 0.0,
    "tuning.projections": ["qkv", "q", "kv", "out", "up", "down"],
}

RENAMED = {
    "run.freeze": "tuning.frozen",
    "run.clip": "run.max_grad_norm",
    "run.average": "run.ema_decay",
    "run.interpolate": "run.wise_ft_alpha",
    "run.candidates": "run.num_eval_images",
    "run.beams": "run.num_beams",
    "run.bf16": "parallel.bf16",
    "run.float8": "parallel.float8",
    "run.compile": "parallel.compile",
    "run.checkpoint_activations": "parallel.activation_checkpointing",
    "run.replicas": "parallel.dp_replicate",
    "run.tensorboard": "run.loggers: [tensorboard]",
    "run.save_every": "saving.every",
    "run.save_minutes": "saving.minutes",
    "run.keep": "saving.keep",
    "run.accept_changes": "saving.accept_changes",
    "model.context": "model.context_length (tokens of the longest caption) or model.num_queries (of the pooler)",
    "tokenizer.context": "tokenizer.context_length",
    **{f"{s}.relation": f"{s}.sentences: relation for true, objects for false" for s in ("data", "validation")},
    "generation.beams": "generation.num_beams",
    "generation.max_tokens": "generation.max_new_tokens",
    "generation.min_tokens": "generation.min_new_tokens",
    "generation.no_repeat_ngram": "generation.no_repeat_ngram_size",
}


def replacement(key: str) -> str:
    """Returns a clause that says what an old key is now, or an empty string if the key was never one."""
    if key in RENAMED:
        return f"; it is {RENAMED[key]} now"
    return f"; it was removed: {REMOVED[key].reason}" if key in REMOVED else ""


def current_keys(saved: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Any]:
    """Returns the values that an older version saved by its keys, by today's keys.

    Keys in wanted are today's. A removed key is left out where its value is what the library now always does; an added
    one has the value that changes nothing.
    """
    current: dict[str, Any] = {key: value for key, value in ADDED.items() if key in wanted}
    for key, value in saved.items():
        if key in REMOVED and value == REMOVED[key].value:
            continue
        names = [key] if key in wanted or key not in RENAMED else re.findall(r"\w+\.\w+", RENAMED[key])
        current |= dict.fromkeys(names, value)
    return current
