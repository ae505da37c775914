"""A tar shard of images, and the files that hold its captions: JSON lines, counts, and a tar in the same layout."""

import json
import os
import tarfile
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from grr.data.formats.pack import add_member
from grr.data.formats.shard_index import IMAGE, JSON, MAX_TEXT, TEXTS, members_by_key
from grr.data.formats.tar import Member
from grr.data.images import BadImage, Crop, load_image, thumbnail
from grr.data.pairs import MAX_BYTES
from grr.data.records import Records
from grr.files.atomic import replace_file, write_atomic
from grr.files.regular import open_regular_file
from grr.inference.results import Row, json_line, rows_of

PARTS = "parts"  # folder of the rows of shards that are not complete


class ShardImage(NamedTuple):
    """Image of a shard. fault: why it cannot be read, which its members show; else empty."""

    shard: Path
    name: str  # in rows: SHARD.tar/KEY.jpg
    member: Member
    texts: tuple[Member, ...]  # KEY.txt, KEY.json ... of its key
    fault: str

    @property
    def key(self) -> str:
        """The name of its members without the suffix."""
        return os.path.splitext(self.member.name)[0]


def shard_images(shard: Path) -> tuple[list[ShardImage], list[str]]:
    """Returns every image of a shard, and a text for each part in which members cannot be separated.

    Only headers are read. All images of a key that has several have a fault, because its captions would be ambiguous.
    """
    records, images, names = Records(), list[ShardImage](), set[str]()
    with open_regular_file(shard) as file:
        samples = members_by_key(shard, file, records)
    for sample in samples.values():
        texts = tuple(m for kind, members in sample.items() if kind != IMAGE for m in members if len(members) == 1)
        for member in sample.get(IMAGE, ()):
            fault = member.fault
            if len(sample[IMAGE]) > 1:
                fault = "one of several images of a key"
            elif member.size > MAX_BYTES:
                fault = f"image of more than {MAX_BYTES:,} bytes"
            name, number = f"{shard.name}/{member.name}", 1
            while name in names:  # a tar may hold two members of one name
                number += 1
                name = f"{shard.name}/{member.name} #{number}"
            names.add(name)
            images.append(ShardImage(shard, name, member, texts, fault))
    return images, records.damaged


def read_shard_image(image: ShardImage, *, size: int, crop: Crop) -> Tensor:
    """Read an image of a shard as `load_image` does. Raises BadImage or OSError."""
    return load_image(_content(image), size=size, crop=crop)


def shard_thumbnails(shard: Path, names: list[str]) -> Iterator[Tensor | str]:
    """Read images of a shard, by the names in their rows, as thumbnails; or the reason why one cannot be read."""
    images = {image.name: image for image in shard_images(shard)[0]}
    for name in names:
        try:
            yield thumbnail(_content(images[name]))
        except (BadImage, OSError, KeyError) as error:
            yield str(error)


class CaptionedShard:
    """The files of the captions of a shard in a folder.

    NAME.jsonl has a row for each image of the shard, in its order; NAME.tar, if it is asked for, the images with a
    caption; NAME_stats.json the counts, and is written last. The shard is complete when all of them exist. Before, each
    process appends the rows of its images to a file of its own in parts/.
    """

    def __init__(self, folder: Path, shard: Path, *, write_tar: bool = False) -> None:
        self.folder, self.shard, self.name = folder, shard, shard.stem
        self.rows, self.tar = folder / f"{self.name}.jsonl", folder / f"{self.name}.tar"
        self.stats = folder / f"{self.name}_stats.json"
        self.write_tar = write_tar

    def is_complete(self) -> bool:
        """Returns whether all captions are written. Raises ValueError if they are of another shard of this name."""
        if not self.stats.is_file():
            return False
        size, before = self.shard.stat().st_size, self.facts()["bytes"]
        if size != before:
            raise ValueError(
                f"caption_shards: {self.folder} holds captions of another {self.shard.name}, of {before:,} bytes; "
                f"{self.shard} has {size:,}; set another folder, or delete {self.stats.name} to caption it again"
            )
        return self.rows.is_file() and (self.tar.is_file() or not self.write_tar)

    def facts(self) -> dict[str, Any]:
        """Returns the counts of a complete shard."""
        facts: dict[str, Any] = json.loads(self.stats.read_bytes())
        return facts

    def log(self, rank: int) -> Path:
        """Returns the file to which a process appends rows."""
        return self.folder / PARTS / f"{self.name}.rank{rank}.jsonl"

    def logs(self) -> list[Path]:
        """Returns the files of all processes, of this run and earlier ones."""
        return sorted((self.folder / PARTS).glob(f"{escape(self.name)}.rank*.jsonl"))

    def done(self) -> set[str]:
        """Returns the names of the images that have a row without an error, which is tried again."""
        return {row["file"] for row in rows_of(*self.logs()) if "error" not in row}

    def begin(self) -> None:
        """Cut off what a kill left of a line, and remove what it left of a complete shard.

        The counts of a shard without its other files are removed, because they would complete it before its last file.
        """
        complete = self.is_complete()
        if not complete:
            self.stats.unlink(missing_ok=True)
        for log in self.logs():
            if complete:
                log.unlink()
            else:
                content = log.read_bytes()
                write_atomic(log, content[: content.rfind(b"\n") + 1])

    def finish(self) -> None:
        """Write the files of the shard, each aside and renamed, the counts last; then remove the parts.

        Raises ValueError if an image has no row.
        """
        images, damaged = shard_images(self.shard)
        rows: dict[str, Row] = {}
        for row in rows_of(*self.logs()):
            if row["file"] not in rows or "error" in rows[row["file"]]:
                rows[row["file"]] = row
        if missing := [image.name for image in images if image.name not in rows]:
            raise ValueError(
                f"caption_shards: each image must have a row, got none in {self.folder / PARTS} for {len(missing):,} "
                f"such as {missing[0]}; was a file removed? run the same command again"
            )
        records = Records()
        records.damaged = damaged
        for image in images:
            _count(rows[image.name], records)
        if self.write_tar:
            aside = self.tar.with_name(f"{self.tar.name}.tmp")
            with open_regular_file(self.shard) as file, tarfile.open(aside, "w") as tar:
                for image in images:
                    if rows[image.name].get("caption"):
                        _add_sample(tar, file, image, rows[image.name])
            replace_file(aside, self.tar)
        write_atomic(self.rows, b"".join(json_line(rows[image.name]) for image in images))
        facts = {"bytes": self.shard.stat().st_size, "images": len(images), **records.facts()}
        write_atomic(self.stats, json.dumps(facts, indent=1))
        for log in self.logs():
            log.unlink()


def _content(image: ShardImage) -> bytes:
    if image.fault:
        raise BadImage(image.fault)
    with open_regular_file(image.shard) as file:
        return _read(file, image.member)


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _count(row: Row, records: Records) -> None:
    """Count the image of a row: captioned, or skipped for a reason."""
    if row.get("caption"):
        records.read += 1
    else:
        records.skip(row["file"], row.get("error") or row["filtered"])


def _add_sample(tar: tarfile.TarFile, file: BinaryIO, image: ShardImage, row: Row) -> None:
    """Append an image, its bytes unchanged, its caption as KEY.txt, and KEY.json: the old one with caption and scores.

    Several captions are a list in KEY.json alone, because readers take KEY.txt for the only one.
    """
    add_member(tar, image.member.name, _read(file, image.member))
    texts = {os.path.splitext(member.name)[1].lower(): member for member in image.texts}
    facts = _object(file, texts.get(JSON))
    old = next((_text(file, texts[suffix]) for suffix in TEXTS if suffix in texts), facts.get("caption"))
    facts |= {key: value for key, value in row.items() if key != "file"} | {"old_caption": old}
    if isinstance(row["caption"], str):
        add_member(tar, f"{image.key}.txt", row["caption"].encode())
    add_member(tar, f"{image.key}.json", json.dumps(facts).encode())


def _object(file: BinaryIO, member: Member | None) -> dict[str, Any]:
    """Returns the JSON object of a member; an empty one if it has another content."""
    try:
        value = json.loads(_text(file, member)) if member is not None else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(file: BinaryIO, member: Member) -> str:
    if member.fault or member.size > MAX_TEXT:
        return ""
    return _read(file, member).decode("utf-8-sig", "replace")
