"""Members of tar files are those that tarfile finds; where it stops or fails, the other members are found too."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.data.formats.tar import BLOCK, MAX_HEADER, Damage, Member, read_members

FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
LETTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/")
NAMES = st.one_of(st.text(LETTERS, min_size=1, max_size=9), st.integers(90, 400).map(lambda n: "n" * n))
CONTENTS = st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=5)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tars") / "0.tar"


def archive(members, form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Returns a header of any size and type with a valid checksum."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    field = size.to_bytes(12, "big", signed=True) if size < 0 or size >= 8**11 else b"%011o\0" % size
    block[124:136] = (b"\x80" if size > 0 and field[0] == 0 else field[:1]) + field[1:] if len(field) == 12 else field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def members_of(shard: Path, content: bytes) -> list[Member | Damage]:
    shard.write_bytes(content)
    with open(shard, "rb") as file:
        return list(read_members(file))


GOOD = archive([("good.jpg", b"an image"), ("good.txt", b"a caption")])
START = GOOD[: 4 * BLOCK]  # without the trailing zeros


@given(contents=CONTENTS, form=FORMATS)
def test_members_are_those_of_tarfile(shard, contents, form):
    found = members_of(shard, archive(contents, form))
    with tarfile.open(shard) as tar:
        assert found == [Member(m.name, m.offset_data, m.size, "") for m in tar]


@given(contents=CONTENTS, form=FORMATS, cut=st.floats(0, 1))
def test_of_a_file_that_was_cut_off_the_members_before_the_cut_are_found(shard, contents, form, cut):
    whole = archive(contents, form)
    complete = members_of(shard, whole)
    length = int(cut * len(whole))
    found = members_of(shard, whole[:length])
    members = [item for item in found if isinstance(item, Member)]
    assert members == [m for m in complete if m.offset + m.size <= length]
    if not length:
        assert found == [Damage(0, "the file is empty")]


@given(contents=CONTENTS, noise=st.binary(min_size=1, max_size=3 * BLOCK))
def test_members_after_noise_are_found(shard, contents, noise):
    noise = b"\x01" + padded(noise)[1:]
    found = members_of(shard, START + noise + archive(contents))
    names = [item.name for item in found if isinstance(item, Member)]
    assert names == ["good.jpg", "good.txt", *(name for name, _ in contents)]
    assert [item.offset for item in found if isinstance(item, Damage)] == [len(START)]


@pytest.mark.parametrize("padding", [2 * BLOCK, len(GOOD) - len(START)])  # the least, and that of tarfile
def test_archives_that_were_joined_are_read_to_the_end(shard, padding):
    found = members_of(shard, (START + bytes(padding)) * 3)
    assert [item.name for item in found] == ["good.jpg", "good.txt"] * 3


@given(hole=st.integers(0, 98), blocks=st.integers(1, 8), last=st.booleans(), joined=st.booleans())
def test_members_that_zeros_replaced_are_reported(shard, hole, blocks, last, joined):
    whole = archive([(f"{number:02d}.jpg", b"x" * 8 * BLOCK) for number in range(100)])  # 9 blocks for each
    if joined:
        whole = archive([("before.jpg", b"")]) + whole
    start = whole.index(b"%02d.jpg" % hole) + (8 * BLOCK if last else 0)  # a header, or the end of a content
    torn = whole[:start] + bytes(blocks * BLOCK) + whole[start + blocks * BLOCK :]
    found = members_of(shard, torn)
    lost = [number for number in range(100) if b"%02d.jpg" % number not in torn]
    kept = [f"{number:02d}.jpg" for number in range(100) if number not in lost]
    assert [item.name for item in found if isinstance(item, Member)] == ["before.jpg"] * joined + kept
    expected = [whole.index(b"%02d.jpg" % number) for number in lost[:1]]
    assert [item.offset for item in found if isinstance(item, Damage)] == expected


def test_a_member_that_zeros_replaced_exactly_is_reported(shard):
    whole = archive([(f"{number}.jpg", b"x" * 3 * BLOCK) for number in range(3)])
    found = members_of(shard, whole[: 4 * BLOCK] + bytes(4 * BLOCK) + whole[8 * BLOCK :])
    assert [getattr(item, "name", item.offset) for item in found] == ["0.jpg", 4 * BLOCK, "2.jpg"]


@given(content=st.binary(min_size=1, max_size=BLOCK))
def test_content_after_the_end_of_an_archive_is_reported(shard, content):
    found = members_of(shard, GOOD + b"\x01" + content)
    assert [item.offset for item in found if isinstance(item, Damage)] == [len(START)]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.DIRTYPE, "a folder"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (b"Q", "of an unknown type"),
    ],
)
def test_members_of_other_types_have_a_fault_and_the_next_ones_are_read(shard, kind, fault):
    found = members_of(shard, header("odd.jpg", kind=kind) + GOOD)
    assert [(item.name, item.fault) for item in found] == [("odd.jpg", fault), ("good.jpg", ""), ("good.txt", "")]


@pytest.mark.parametrize("size", [-1, -512, -(2**62), 10**6, 2**62])
def test_a_false_size_affects_only_its_member(shard, size):
    found = members_of(shard, header("odd.jpg", size) + padded(b"content") + GOOD)
    assert [(item.name, item.fault) for item in found] == [
        ("odd.jpg", "its size cannot be true"),
        ("good.jpg", ""),
        ("good.txt", ""),
    ]


def test_ten_thousand_long_headers_and_one_that_is_too_long_do_not_stop_the_reading(shard):
    long_name = header("././@LongLink", 120, tarfile.GNUTYPE_LONGNAME) + padded(b"n" * 119 + b"\0")
    assert [item.name for item in members_of(shard, long_name * 10_000 + GOOD)] == ["n" * 119, "good.txt"]
    too_long = header("././@LongLink", MAX_HEADER + 1, tarfile.GNUTYPE_LONGNAME) + padded(b"n" * (MAX_HEADER + 1))
    first, *others = members_of(shard, too_long + GOOD)
    assert first.fault == "its long header has more than 65,536 bytes"
    assert [item.fault for item in others] == [""]


def test_sparse_files_have_a_fault_and_their_maps_are_skipped(shard):
    block = bytearray(header("hole.jpg", 512, tarfile.GNUTYPE_SPARSE))
    block[482] = 1  # a map follows, which announces another
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    first_map = bytearray(BLOCK)
    first_map[504] = 1
    old = bytes(block) + bytes(first_map) + bytes(BLOCK) + padded(b"x" * 512)
    records = b"23 GNU.sparse.major=1\n\n"
    new = header("pax", len(records), tarfile.XHDTYPE) + padded(records) + header("new.jpg", 3) + padded(b"xyz")
    found = members_of(shard, old + new + GOOD)
    assert [(item.name, item.fault) for item in found] == [
        ("hole.jpg", "a sparse file"),
        ("new.jpg", "a sparse file"),
        ("good.jpg", ""),
        ("good.txt", ""),
    ]


@given(content=st.binary(max_size=200))
def test_an_extended_header_of_any_content_does_not_stop_the_reading(shard, content):
    found = members_of(shard, header("pax", len(content), tarfile.XHDTYPE) + padded(content) + GOOD)
    assert found[-1].name == "good.txt"


@given(content=st.binary(max_size=4 * BLOCK))
def test_a_file_of_any_content_is_read_to_its_end(shard, content):
    for item in members_of(shard, content):
        assert isinstance(item, Damage) or item.offset + item.size <= len(content)
