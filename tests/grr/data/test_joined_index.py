"""The index of shards that the processes of a host share: memory, damage, several writers, shards that change."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.data.formats import joined_index, shard_index
from grr.data.formats.shards import TarShards, webdataset
from grr.data.pairs import Texts
from grr.data.records import Records
from grr.evaluation.scale import index_bytes
from grr.files.columns import map_columns, write_columns

PAIRS, SHARDS = 50_000, 4  # in each shard


def write_shard(folder: Path, number: int, pairs: int) -> None:
    """A shard without content, and its index file as if it had been read: captions of 60 letters."""
    shard = folder / f"{number:05d}.tar"
    with shard.open("wb") as file:
        file.truncate(pairs * 1000)
    state = shard.stat()
    names = [f"{number:05d}/{i:09d}" for i in range(pairs)]
    ids, captions = (
        Texts.of(names),
        Texts.of(f"{name} a caption of a picture, about as long as they are" for name in names),
    )
    records = Records()
    records.read = pairs
    hashes = np.frombuffer(hashlib.shake_128(shard.name.encode()).digest(8 * pairs), dtype=np.uint64)
    index = {
        "state": np.array([shard_index.LAYOUT, state.st_size, state.st_mtime_ns]),
        "ids": np.frombuffer(ids.data, dtype=np.uint8),
        "ids_ends": ids.ends,
        "captions": np.frombuffer(captions.data, dtype=np.uint8),
        "captions_ends": captions.ends,
        "image_of": np.arange(pairs),
        "offsets": np.arange(pairs) * 1000,
        "sizes": np.full(pairs, 1000),
        "places": hashes,
        "records": np.frombuffer(json.dumps(records.facts()).encode(), dtype=np.uint8),
    }
    (folder / ".grr_index").mkdir(exist_ok=True)
    np.savez(folder / ".grr_index" / f"{shard.name}.npz", **index)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(SHARDS):
        write_shard(folder, number, PAIRS)
    return folder


READER = """
import sys
from grr.data import Pairs, webdataset
from grr.data.order import Epochs
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))
def use(pairs):
    print(pairs.fingerprint, pairs.captions[len(pairs) - 1], file=sys.stderr)
    Epochs(pairs.groups, seed=0, batch_size=768).batch(0, 0)
    return len(pairs)
pairs = webdataset(shards=sys.argv[1])  # imports, and writes the index
use(pairs)
del pairs
print("ready", flush=True)
input()
before = private()
held = [webdataset(shards=sys.argv[1], split=split) for split in sys.argv[2].split()]
n = sum(map(use, held))
print("read", flush=True)
input()
print((private() - before) / n, flush=True)
"""


def private_bytes(shards: Path, splits: str) -> list[float]:
    """Returns the bytes a pair that two processes hold for themselves, while both have read the data."""
    command = [sys.executable, "-c", READER, str(shards), splits]
    readers = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    try:
        for word in ("ready", "read"):
            for reader in readers:
                assert reader.stdout.readline().strip() == word, reader.stderr.read()
            for reader in readers:
                reader.stdin.write("\n")
                reader.stdin.flush()
        return [float(reader.stdout.readline()) for reader in readers]
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate(timeout=60)


def test_two_processes_hold_less_than_24_bytes_a_pair_of_their_splits_for_themselves(shards):
    bytes_a_pair = private_bytes(shards, "train validation")
    assert all(size < 24 for size in bytes_a_pair), bytes_a_pair
    assert len(list((shards / ".grr_index").glob("*.joined"))) == 1


def test_an_index_and_the_rows_of_a_split_take_the_bytes_that_are_on_paper(shards):
    pairs = webdataset(shards=str(shards))
    (file,) = (shards / ".grr_index").glob("*.joined")
    shared, _ = index_bytes(len(pairs), (len(pairs.index["ids"]) + len(pairs.index["captions"])) / len(pairs))
    assert 0 <= file.stat().st_size - shared < 5000  # the header, and the records of each shard
    train = webdataset(shards=str(shards), split="train")
    assert train._rows.nbytes + train.image_of.nbytes == index_bytes(len(train), 0)[1]


def test_an_index_in_memory_and_a_mapped_one_are_one_data_set(shards):
    mapped, files = webdataset(shards=str(shards)), sorted(shards.glob("*.tar"))
    in_memory = TarShards(files, joined_index._Parts(files, None).in_memory())
    for chosen in (None, mapped.index["places"] % np.uint64(3) == 0):
        if chosen is not None:
            mapped.keep(chosen)
            in_memory.keep(chosen)
        assert in_memory.fingerprint == mapped.fingerprint
        assert (in_memory.image_of == mapped.image_of).all()
        assert in_memory.records.facts() == mapped.records.facts()
        for i in (0, 7, len(mapped) - 1):
            assert in_memory.place(i) == mapped.place(i)
            assert (in_memory.ids[i], in_memory.captions[i]) == (mapped.ids[i], mapped.captions[i])


def test_the_fingerprint_is_the_hash_of_lengths_and_texts(shards):
    """Of version 0.1: a run that it began has this fingerprint in its identity."""
    pairs = webdataset(shards=str(shards / "00000.tar"), split="validation")
    digests = b""
    for texts in (list(pairs.ids), list(pairs.captions)):
        lengths = np.array([len(text.encode()) for text in texts], dtype="<i8").tobytes()
        digests += hashlib.blake2b(lengths + "".join(texts).encode(), digest_size=16).digest()
    assert pairs.fingerprint == hashlib.blake2b(digests, digest_size=16).hexdigest()


@pytest.fixture
def small(tmp_path) -> Path:
    for number in range(2):
        write_shard(tmp_path, number, 10)
    return tmp_path


@pytest.mark.parametrize("damage", ["noise", "cut off", "empty", "outside", "not text", "a pipe"])
def test_a_damaged_index_is_replaced(small, damage):
    whole = webdataset(shards=str(small))
    (file,) = (small / ".grr_index").glob("*.joined")
    content = bytearray(file.read_bytes())
    if damage == "a pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        columns = {name: np.array(column) for name, column in map_columns(file).items()}
        columns["offsets"][3] = 10**9 if damage == "outside" else 3000
        columns["captions"][0] = 0xFF if damage == "not text" else ord("0")
        with file.with_suffix(".new").open("wb") as new:
            write_columns(new, {name: (column.dtype, len(column)) for name, column in columns.items()}, [columns])
        os.replace(file.with_suffix(".new"), file)
        if damage in ("noise", "cut off", "empty"):
            file.write_bytes({"noise": b"noise" * 100, "cut off": content[:-40], "empty": b""}[damage])
    again = webdataset(shards=str(small))
    assert [again.place(i) for i in range(20)] == [whole.place(i) for i in range(20)]
    assert again.fingerprint == whole.fingerprint
    assert file.read_bytes() == content


def test_a_shard_that_changes_or_is_added_changes_the_index_and_an_unused_one_is_removed(small):
    assert len(webdataset(shards=str(small))) == 20
    write_shard(small, 1, 15)
    assert len(webdataset(shards=str(small))) == 25
    for file in (small / ".grr_index").glob("*.joined"):
        os.utime(file, (time.time() - 100 * 86_400,) * 2)
    write_shard(small, 2, 5)
    pairs = webdataset(shards=str(small))
    assert len(pairs) == 30
    assert pairs.place(29)[0].name == "00002.tar"
    assert len(list((small / ".grr_index").glob("*.joined"))) == 1


@given(parts=st.lists(st.lists(st.integers(0, 255), max_size=40), max_size=5))
def test_columns_are_read_as_they_were_written(tmp_path_factory, parts):
    file = tmp_path_factory.mktemp("columns") / "file"
    total = sum(map(len, parts))
    columns = {"bytes": (np.uint8, total), "numbers": (np.int64, total), "none": (np.float32, 0)}
    with file.open("wb") as out:
        write_columns(out, columns, [{"bytes": np.array(p), "numbers": -np.array(p, dtype=np.int64)} for p in parts])
    read = map_columns(file)
    whole = [x for part in parts for x in part]
    assert read["bytes"].tolist() == whole
    assert read["numbers"].tolist() == [-x for x in whole]
    assert [column.dtype for column in read.values()] == [np.uint8, np.int64, np.float32]
