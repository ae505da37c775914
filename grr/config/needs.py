"""Options that have no effect unless another option allows it, by `section.key`, so that they are not set in vain."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Need(NamedTuple):
    """What an option needs to have an effect."""

    other: str  # section.key
    rule: str  # a clause that follows the name of the other option
    holds: Callable[[Any], bool]  # of the other option's value


_SAMPLING = Need("generation.temperature", "is above 0", lambda temperature: temperature > 0)

_ADAPTERS = Need("tuning.lora", "names a part", bool)

NEEDS = {
    "run.patch_dropout_epochs": Need("model.patch_dropout", "is above 0", lambda p: p > 0),
    "model.logit_bias": Need("loss.contrastive", "is sigmoid", lambda loss: loss == "sigmoid"),
    "optimizer.decay_all": Need("optimizer.weight_decay", "is above 0", lambda decay: decay > 0),
    "generation.length_penalty": Need("generation.num_beams", "is above 1", lambda num_beams: num_beams > 1),
    "loader.prefetch": Need("loader.workers", "is above 0", lambda workers: workers > 0),
    "control.factor": Need("control.regimes", "is above 1", lambda regimes: regimes > 1),
    "run.merge_adapters": _ADAPTERS,
    "tuning.rank": _ADAPTERS,
    "tuning.alpha": _ADAPTERS,
    "tuning.dropout": _ADAPTERS,
    "tuning.projections": _ADAPTERS,
    "generation.seed": _SAMPLING,
    "generation.top_k": _SAMPLING,
    "generation.top_p": _SAMPLING,
}


def without_effect(sections: Mapping[str, Mapping[str, Any]], changed: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the options that have no effect, and why, as text.

    sections: the values of all options. changed: the `section.key` of those that differ from their defaults.
    """
    for option, need in NEEDS.items():
        (section, key), (other_section, other) = option.split("."), need.other.split(".")
        if option not in changed or other not in sections.get(other_section, {}):
            continue
        value, other_value = sections[section][key], sections[other_section][other]
        if not need.holds(other_value):
            yield (
                option,
                f"has no effect unless {need.other} {need.rule}, got {value!r} with {need.other}={other_value!r}; "
                f"set {need.other}, or leave {key} out",
            )
