"""Check of the sizes that builders take, so that a wrong one is named before torch is asked for it."""

from collections.abc import Mapping
from numbers import Integral

LOWEST = {
    "vocab_size": 5,  # PAD, EOS, UNK, BOS and CLS
    "context_length": 4,  # BOS, a token, EOS and CLS
    **dict.fromkeys(("num_queries", "image_size", "patch_size", "dim", "vision_dim"), 1),
    **dict.fromkeys(("num_heads", "vision_heads", "pooler_heads"), 1),
    **dict.fromkeys(("num_layers", "vision_layers", "text_layers", "multimodal_layers"), 0),
}


def check_sizes(who: str, arguments: Mapping[str, object]) -> None:
    """Raise ValueError, naming the argument, if a size among a builder's arguments is not an int or is too low."""
    for name, value in arguments.items():
        lowest = LOWEST.get(name)
        if lowest is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < lowest:
            raise ValueError(
                f"{who}: {name} must be an int of at least {lowest}, got {name}={value!r}; give a whole number, or "
                "leave it out for the default"
            )
