"""Texts from outside, as a terminal may show them: names of files, captions, classes, columns, messages of errors."""

import logging
import unicodedata


def printable(text: str) -> str:
    """Returns a text on one line; as Python would write it, in quotes, if a character of it must not reach a terminal.

    Those are control characters, which move the cursor, clear the screen or set its title, line breaks, characters that
    change the direction of writing, and those that no encoding has.
    """
    return text if all(map(_is_shown, text)) else repr(text)


def printable_lines(text: str) -> str:
    """Returns a text of several lines; a character that must not reach a terminal is written as its escape."""
    return "".join(c if c == "\n" or _is_shown(c) else repr(c)[1:-1] for c in text)


class PrintableRecord(logging.LogRecord):
    """A log record without control characters in its message; for logging.setLogRecordFactory."""

    def getMessage(self) -> str:  # the name that logging calls
        return printable_lines(super().getMessage())


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # spaces of other widths
