"""Index of a tar shard: its samples, found by reading the shard once and kept in a file beside it."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from grr.data.formats.tar import FOLDER, Damage, Member, read_members
from grr.data.images import SUFFIXES
from grr.data.pairs import MAX_BYTES, Texts
from grr.data.records import Records, file_name, record_captions
from grr.files.atomic import replace_file
from grr.files.regular import open_regular_file
from grr.seeds import stable_hash

logger = logging.getLogger(__name__)

TEXTS = (".txt", ".caption", ".text")  # suffixes of captions; the first that a key has is read, otherwise .json
MAX_TEXT = 2**24  # bytes of a caption's member
LAYOUT = 3  # of an index file; a file of another layout is rebuilt
STALE = 3600  # seconds after which a temporary file belongs to a process that was killed
COLUMNS = {
    "ids": np.uint8,
    "ids_ends": np.int64,
    "captions": np.uint8,
    "captions_ends": np.int64,
    "image_of": np.int64,
    "offsets": np.int64,
    "sizes": np.int64,
    "places": np.uint64,  # hashes of the samples' names
    "records": np.uint8,
}
IMAGE, JSON = "image", ".json"  # kinds of members, with TEXTS
Index = dict[str, NDArray[Any]]
Sample = dict[str, list[Member]]  # kind -> the members of a key


def shard_index(shard: Path, cache: str | None) -> tuple[Index, bool]:
    """Returns the index of a shard, from its index file or by reading the shard, and whether the file exists.

    After reading the shard, it tries to write the file, in the folder `cache` or .grr_index beside the shard.
    """
    stat = shard.stat()
    state = np.array([LAYOUT, stat.st_size, stat.st_mtime_ns])
    folder = cache_folder(shard, cache)
    file = folder / f"{shard.name}.npz"
    with contextlib.suppress(Exception):  # a missing file, or any error of a damaged zip file: the index is rebuilt
        index = _load(file)
        if np.array_equal(index["state"], state):
            _check(index, stat.st_size)
            return index, True
    index = _read_shard(shard)
    try:
        make_cache_folder(folder)
        _save(file, index | {"state": state})
    except OSError as error:
        message = (
            "webdataset: the index of %s is kept in memory and rebuilt by each run, because %s cannot be written (%s); "
            "set data.cache to a folder"
        )
        logger.warning(message, shard, folder, error)
        return index, False
    return index, True


def cache_folder(shard: Path, cache: str | None) -> Path:
    """Returns the folder of a shard's index; a shared `cache` has a subfolder for each folder of shards, by hash."""
    if cache is None:
        return shard.parent / ".grr_index"
    return Path(cache, hashlib.blake2b(str(shard.parent.resolve()).encode(), digest_size=8).hexdigest())


def make_cache_folder(folder: Path) -> None:
    """Create a folder for index files, or remove from it what killed processes left. Raises OSError for a link."""
    if folder.is_symlink():
        raise OSError("it is a link, which another user may have created")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)


def _load(file: Path) -> Index:
    """Load the arrays of an index file; it must not be compressed, so that it takes no more memory than its size."""
    with open_regular_file(file) as raw, zipfile.ZipFile(raw) as packed:
        if any(part.compress_type != zipfile.ZIP_STORED for part in packed.infolist()):
            raise ValueError("compressed")
        raw.seek(0)
        with np.load(raw, allow_pickle=False) as arrays:
            return dict(arrays)


def _check(index: Index, shard_size: int) -> None:
    """Raise ValueError or KeyError if the arrays of an index do not fit each other or the shard."""
    n = len(index["offsets"])
    whole = all(index[name].dtype == kind and index[name].ndim == 1 for name, kind in COLUMNS.items())
    equal = all(len(index[name]) == n for name in ("ids_ends", "captions_ends", "image_of", "sizes", "places"))
    texts = True
    for name in ("ids", "captions"):
        ends = index[f"{name}_ends"]
        str(index[name].tobytes(), "utf-8")
        texts &= bool((np.diff(ends, prepend=0) >= 0).all()) and (int(ends[-1]) if n else 0) == len(index[name])
    inside = (index["offsets"] >= 0) & (index["sizes"] >= 0) & (index["sizes"] <= shard_size - index["offsets"])
    steps = np.diff(index["image_of"], prepend=-1)
    if not (whole and equal and texts and inside.all() and ((steps == 0) | (steps == 1)).all()):
        raise ValueError("index: its arrays do not fit each other")
    Records.of_facts(json.loads(index["records"].tobytes()))


def _save(file: Path, index: Index) -> None:
    """Write an index to a temporary file and rename it."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}.", suffix=".tmp", delete=False) as aside:
        try:
            np.savez(aside, **index)  # type: ignore[arg-type]
            aside.close()
            replace_file(Path(aside.name), file)
        except BaseException:
            os.unlink(aside.name)
            raise


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote."""
    for file in (*folder.glob("*.tmp"), *folder.glob("tmp????????")):
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - file.lstat().st_mtime > STALE:
                file.unlink()


def _read_shard(shard: Path) -> Index:
    """Read the index of a shard: the id and the caption of each pair, and the byte range of its image."""
    records = Records()
    ids, captions, hashes, images = list[str](), list[str](), list[int](), list[tuple[int, int, int]]()
    with open_regular_file(shard) as file:
        for number, (key, sample) in enumerate(_samples(shard, file, records).items()):
            name, image = f"{shard.stem}/{key}", sample[IMAGE][0]
            for i, caption in enumerate(_sample_captions(name, file, sample, records)):
                ids.append(f"{name}#{i}" if i else name)
                captions.append(caption)
                hashes.append(stable_hash(name))
                images.append((number, image.offset, image.size))
    records.read = len(ids)
    where = np.array(images, dtype=np.int64).reshape(-1, 3)
    index: Index = {
        "image_of": np.unique(where[:, 0], return_inverse=True)[1].astype(np.int64),
        "offsets": where[:, 1],
        "sizes": where[:, 2],
        "places": np.array(hashes, dtype=np.uint64),
        "records": np.frombuffer(json.dumps(records.facts()).encode(), dtype=np.uint8),
    }
    for column, texts in (("ids", Texts.of(ids)), ("captions", Texts.of(captions))):
        index |= {column: np.frombuffer(texts.data, dtype=np.uint8), f"{column}_ends": texts.ends}
    return index


def _samples(shard: Path, file: BinaryIO, records: Records) -> dict[str, Sample]:
    """Returns the samples of a shard that have one image and a caption, by key; all others are counted."""
    samples = members_by_key(shard, file, records)
    return {key: sample for key, sample in samples.items() if _is_whole(f"{shard.stem}/{key}", sample, records)}


def members_by_key(shard: Path, file: BinaryIO, records: Records) -> dict[str, Sample]:
    """Returns the images and captions of a shard by key, in the order of the keys; damage and all else is counted."""
    samples: defaultdict[str, Sample] = defaultdict(lambda: defaultdict(list))
    items = list(read_members(file))
    rest = "; the rest is used" if any(isinstance(item, Member) for item in items) else ""
    for item in items:
        if isinstance(item, Damage):
            records.damaged.append(f"{shard} is damaged at byte {item.offset:,}: {item.reason}{rest}")
            continue
        key, extension = os.path.splitext(file_name(item.name))
        kind = IMAGE if extension.lower() in SUFFIXES else extension.lower()
        if kind in (IMAGE, *TEXTS, JSON) and not os.path.basename(key).startswith("._"):  # macOS metadata files
            samples[key][kind].append(item)
        elif item.fault not in ("", FOLDER):
            records.skip(f"{shard.stem}/{key}{extension}", item.fault)
        else:
            records.leave_out("neither an image nor a caption")
    return samples


def _is_whole(name: str, sample: Sample, records: Records) -> bool:
    """Returns whether a sample has one image and a caption; otherwise count it as skipped."""
    endings = Counter(os.path.splitext(member.name)[1].lower() for members in sample.values() for member in members)
    repeated = max(endings.values())
    faults = [member.fault for members in sample.values() for member in members if member.fault]
    if repeated > 1:
        records.skip(name, "key that occurs more than once", repeated)
    elif faults:
        records.skip(name, faults[0])
    elif IMAGE not in sample:
        records.skip(name, "caption without an image")
    elif len(sample[IMAGE]) > 1:
        records.skip(name, "more than one image")
    elif sample[IMAGE][0].size > MAX_BYTES:
        records.skip(name, f"image of more than {MAX_BYTES:,} bytes")
    elif len(sample) == 1:
        records.skip(name, "image without a caption")
    else:
        return True
    return False


def _sample_captions(name: str, file: BinaryIO, sample: Sample, records: Records) -> list[str]:
    """Returns the captions of a whole sample; captions that cannot be used are counted as skipped."""
    kind = next(kind for kind in (*TEXTS, JSON) if kind in sample)
    member = sample[kind][0]
    if member.size > MAX_TEXT:
        records.skip(name, f"caption of more than {MAX_TEXT:,} bytes")
        return []
    file.seek(member.offset)
    try:
        content: object = file.read(member.size).decode("utf-8-sig")
        if kind == JSON:
            content = json.loads(str(content))
            content = content.get("caption", content.get("text")) if isinstance(content, dict) else content
        captions = record_captions(content, name)
    except UnicodeDecodeError:
        records.skip(name, "caption that is not UTF-8")
    except (json.JSONDecodeError, RecursionError):
        records.skip(name, "JSON that cannot be read")
    except ValueError:
        records.skip(name, "caption that is not text")
    else:
        for _ in range(captions.count("")):
            records.skip(name, "empty caption")
        return [caption for caption in captions if caption]
    return []
