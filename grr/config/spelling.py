"""Suggestions for words that are not known."""

import difflib
from collections.abc import Collection, Iterable


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Returns a clause that names the nearest known word, or an empty string if none is near."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def check_arguments(who: str, given: Iterable[str], known: Collection[str], *, reference: str) -> None:
    """Raise TypeError, with the nearest known name, for the first argument that is not known.

    reference: where the known ones are listed.
    """
    for name in given:
        if name not in known:
            raise TypeError(
                f"{who} takes no argument {name!r}{did_you_mean(name, known)}; {reference} lists those it takes"
            )
