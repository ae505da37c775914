"""The rule of every reader: each record of a file is read, skipped with a reason, or left out on request."""

import logging
import posixpath
import unicodedata
from collections import Counter
from typing import Any

logger = logging.getLogger(__name__)

NAMED = 100  # skipped records whose names are kept, for each reason
SHOWN = 3  # of them in the log


class Records:
    """Count of the records in the files of a data set: read + skipped + left out = all that the files hold.

    read: pairs of an image and a caption. skipped: faulty records, by their reason. left_out: records that were not
    asked for, those of another split, say. damaged: places in files behind which no record can be told from another.
    """

    def __init__(self) -> None:
        self.read = 0
        self.skipped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}  # reason -> the first records that were skipped for it
        self.damaged: list[str] = []

    @property
    def total(self) -> int:
        return self.read + self.skipped.total() + self.left_out.total()

    def skip(self, name: str, reason: str, count: int = 1) -> None:
        """Count records that cannot be used: their place in a file, and why."""
        self.skipped[reason] += count
        names = self.names.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name if name.isprintable() else repr(name))  # a name in a tar may move the cursor

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count records that are sound and were not asked for."""
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
        """The counts and the first names, for a manifest."""
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
        """The counts that `facts` wrote."""
        records = cls()
        records.read = int(facts["read"])
        for reason, skipped in facts["skipped"].items():
            records.skipped[reason] = int(skipped["count"])
            records.names[reason] = [str(name) for name in skipped["first"]]
        records.left_out = Counter({reason: int(count) for reason, count in facts["left_out"].items()})
        records.damaged = [str(line) for line in facts["damaged"]]
        return records

    def log(self, who: str) -> None:
        """Write a warning for each reason and each damaged file, and the whole count where not all was read."""
        for reason, count in self.skipped.items():
            names = [name.removeprefix(f"{who} ") for name in self.names[reason][:SHOWN]]
            more = " ..." if count > len(names) else ""
            logger.warning(
                "%s: %d of %d records skipped: %s: %s%s", who, count, self.total, reason, ", ".join(names), more
            )
        for line in self.damaged[:SHOWN]:
            logger.warning("%s: %s", who.partition(":")[0], line)
        if len(self.damaged) > SHOWN:
            logger.warning("%s: %d more damages", who, len(self.damaged) - SHOWN)
        if self.skipped or self.left_out:
            others = "".join(f" + {count} left out ({reason})" for reason, count in self.left_out.items())
            skipped = self.skipped.total()
            logger.info("%s: %d records = %d read + %d skipped%s", who, self.total, self.read, skipped, others)


def record_captions(value: object, where: str) -> list[str]:
    """The captions that a record holds, white space collapsed: a string is one, a list of strings is several.

    At least one; an empty one is "". Raises ValueError, naming the place, for anything else: a number is no caption.
    """
    captions = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: a caption must be a string or a list of strings, got {_kind(text)}; "
                "write the caption as text, or take the record out"
            )
        if not is_text(text):
            raise ValueError(f"{where}: a caption must be text, got half of a surrogate pair; write the caption anew")
        captions.append(" ".join(text.split()))
    return captions or [""]


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_name(name: str) -> str:
    """The one spelling of a file's name in a table: / between folders, no ./ and no ../, composed (NFC) letters.

    Empty if it names nothing that can be a file. File systems of macOS decompose letters; `image_path` finds those.
    """
    name = name.strip().replace("\\", "/")
    if not name or "\0" in name or not is_text(name):
        return ""
    name = posixpath.normpath(unicodedata.normalize("NFC", name))
    return "" if name == "." else name


def _kind(value: object) -> str:
    """What a value of a JSON file is, in a few words."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return str(value)
    return {"dict": "an object", "list": "a list in a list"}.get(type(value).__name__, type(value).__name__)
