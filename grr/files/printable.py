"""Text from outside (file names, captions, classes, columns, error messages) without control characters."""

import logging
import unicodedata


def printable(text: str) -> str:
    """Returns a text on one line; its repr, in quotes, if it has a character that must not reach a terminal.

    Those are control characters, which move the cursor, clear the screen or set its title, line breaks, characters that
    change the writing direction, and lone surrogates.
    """
    return text if all(map(_is_shown, text)) else repr(text)


def printable_lines(text: str) -> str:
    """Returns a text of several lines, with escapes for characters that must not reach a terminal."""
    return "".join(c if c == "\n" or _is_shown(c) else repr(c)[1:-1] for c in text)


class PrintableRecord(logging.LogRecord):
    """Log record whose message has no control characters; for logging.setLogRecordFactory."""

    def getMessage(self) -> str:  # the name that logging calls
        return printable_lines(super().getMessage())


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # spaces other than U+0020
