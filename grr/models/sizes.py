"""Check of the sizes that builders take, so that a wrong one is named before torch is asked for it."""

from numbers import Integral

LOWEST = {"vocab_size": 5, "context_length": 4}  # PAD, EOS, UNK, BOS and CLS; BOS, a token, EOS and CLS


def check_sizes(who: str, **sizes: int) -> None:
    """Raise ValueError, naming the argument, if a size is not an int or is too low; numbers of layers may be 0."""
    for name, value in sizes.items():
        lowest = LOWEST.get(name, 0 if name.endswith("layers") else 1)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < lowest:
            raise ValueError(
                f"{who}: {name} must be an int of at least {lowest}, got {name}={value!r}; give a whole number, or "
                "leave it out for the default"
            )
