"""Counts of records: a reader reads each record of a file, skips it with a reason, or leaves it out on request."""

import logging
import posixpath
import unicodedata
from collections import Counter
from typing import Any

logger = logging.getLogger(__name__)

NAMED = 100  # names of skipped records that are stored, for each reason
SHOWN = 3  # names in the log


class Records:
    """Counts of the records in the files of a data set: read + skipped + left out = records in the files.

    read: pairs of an image and a caption. skipped: faulty records, by reason. left_out: records that were not asked
    for, such as those of another split, by reason. damaged: parts of files in which records cannot be separated.
    """

    def __init__(self) -> None:
        self.read = 0
        self.skipped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}  # reason -> first records that were skipped for it
        self.damaged: list[str] = []

    @property
    def total(self) -> int:
        return self.read + self.skipped.total() + self.left_out.total()

    def skip(self, name: str, reason: str, count: int = 1) -> None:
        """Count a record that cannot be used, with its position in a file and the reason."""
        self.skipped[reason] += count
        names = self.names.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name if name.isprintable() else repr(name))  # names in a tar may hold control characters

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count records that are valid and were not asked for."""
        if count:
            self.left_out[reason] += count

    def add(self, other: "Records") -> None:
        """Add the counts of other files."""
        self.read += other.read
        self.skipped += other.skipped
        self.left_out += other.left_out
        self.damaged += other.damaged
        for reason, names in other.names.items():
            mine = self.names.setdefault(reason, [])
            mine += names[: NAMED - len(mine)]

    def facts(self) -> dict[str, Any]:
        """Returns the counts and the first names, for a manifest."""
        skipped = {reason: {"count": n, "first": self.names[reason]} for reason, n in self.skipped.items()}
        return {
            "records": self.total,
            "read": self.read,
            "skipped": skipped,
            "left_out": dict(self.left_out),
            "damaged": self.damaged[:NAMED],
        }

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> "Records":
        """Returns the counts that `facts` returned."""
        records = cls()
        records.read = int(facts["read"])
        for reason, skipped in facts["skipped"].items():
            records.skipped[reason] = int(skipped["count"])
            records.names[reason] = [str(name) for name in skipped["first"]]
        records.left_out = Counter({reason: int(count) for reason, count in facts["left_out"].items()})
        records.damaged = [str(line) for line in facts["damaged"]]
        return records

    def log(self, who: str) -> None:
        """Log a warning for each reason and each damaged file, and all counts if some records were not read."""
        for reason, count in self.skipped.items():
            names = [name.removeprefix(f"{who} ") for name in self.names[reason][:SHOWN]]
            listed = ", ".join(names) + (" ..." if count > len(names) else "")
            logger.warning("%s: %d of %d records skipped: %s: %s", who, count, self.total, reason, listed)
        for line in self.damaged[:SHOWN]:
            logger.warning("%s: %s", who.partition(":")[0], line)
        if len(self.damaged) > SHOWN:
            logger.warning("%s: %d more damages", who, len(self.damaged) - SHOWN)
        if self.skipped or self.left_out:
            others = "".join(f" + {count} left out ({reason})" for reason, count in self.left_out.items())
            skipped = self.skipped.total()
            logger.info("%s: %d records = %d read + %d skipped%s", who, self.total, self.read, skipped, others)


def record_captions(value: object, where: str) -> list[str]:
    """Returns the captions of a record, white space collapsed: a string is one, a list of strings several.

    There is at least one; an empty one is "". Raises ValueError, naming the record, for values of other types.
    """
    captions = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: a caption must be a string or a list of strings, got {_kind(text)}; "
                "write the caption as text, or remove the record"
            )
        if not is_text(text):
            raise ValueError(f"{where}: a caption must be text, got half of a surrogate pair; rewrite the caption")
        captions.append(" ".join(text.split()))
    return captions or [""]


def is_text(text: str) -> bool:
    """Returns whether a string can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_name(name: str) -> str:
    """Normalise the name of a file in a table: / between folders, without ./ and inner ../, in NFC.

    Returns "" for a name that cannot be a file's. macOS writes names in NFD; `image_path` finds those.
    """
    name = name.strip().replace("\\", "/")
    if not name or "\0" in name or not is_text(name):
        return ""
    name = posixpath.normpath(unicodedata.normalize("NFC", name))
    return "" if name == "." else name


def _kind(value: object) -> str:
    """Describe the type of a JSON value."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return str(value)
    return {"dict": "an object", "list": "a list in a list"}.get(type(value).__name__, type(value).__name__)
