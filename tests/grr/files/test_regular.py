"""Only regular files of a bounded size are read, and files of other kinds do not block the reader."""

import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.files.regular import open_regular_file, read_regular_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@given(content=st.binary(max_size=200_000), room=st.integers(0, 200_000), linked=st.booleans())
def test_a_regular_file_is_returned_whole_or_refused_for_its_size(folder, content, room, linked):
    file = folder / "a"
    file.write_bytes(content)
    if linked and not (folder / "link").exists():
        (folder / "link").symlink_to(file)
    path = folder / "link" if linked else file
    if len(content) <= room:
        assert read_regular_file(path, room) == content
    else:
        with pytest.raises(OSError, match=f"has {len(content):,} bytes; at most {room:,} are read"):
            read_regular_file(path, room)


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device", "a folder"])
def test_a_file_that_is_not_regular_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "odd"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        (listener := socket.socket(socket.AF_UNIX)).bind(str(path))
        listener.close()
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    errors = []

    def read() -> None:
        try:
            read_regular_file(path, 1000)
        except OSError as error:
            errors.append(error.strerror)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=30)
    assert not reader.is_alive()
    assert errors == [f"must be a regular file, but is {kind}"]


def test_a_pipe_that_replaces_a_file_is_refused_after_it_is_opened(tmp_path, monkeypatch):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(b"x")
    os.mkfifo(pipe)
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: stat(file if path == pipe else path, **options))
    with pytest.raises(OSError, match="must be a regular file, but is a pipe"):
        open_regular_file(pipe)


@pytest.mark.skipif(not os.path.isfile("/proc/self/status"), reason="no /proc here")
def test_a_file_that_states_no_size_is_read_up_to_the_limit():
    assert os.stat("/proc/self/status").st_size == 0
    assert b"Name:" in read_regular_file("/proc/self/status", 100_000)
    with pytest.raises(OSError, match="has more than 100 bytes; at most 100 are read"):
        read_regular_file("/proc/self/status", 100)


def test_a_sparse_file_of_a_terabyte_is_refused_without_memory(tmp_path):
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="has 1,099,511,627,776 bytes"):
        read_regular_file(tmp_path / "hole", 1000)
