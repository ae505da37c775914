"""Files and folders are replaced atomically: after an error at any moment, the old or the new version exists."""

import contextlib
import os
from pathlib import Path

import pytest

from grr.files.atomic import replace_folder, write_atomic
from grr.files.digest import sha256


@pytest.mark.parametrize("content", ["text, 夢\n", b"\x00bytes\xff", ""])
def test_a_file_has_the_content_and_nothing_is_left_beside_it(content, tmp_path):
    path = tmp_path / "deep" / "file.json"
    for _ in range(2):  # anew, and over an old one
        write_atomic(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("call", ["write_bytes", "fsync", "replace"])
def test_an_error_before_the_rename_leaves_the_old_file(call, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr(*((os, call) if call == "fsync" else (Path, call)), fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_content_is_on_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """Without the first fsync, a power failure leaves an empty file; without the second, the old file."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    names = {tmp_path.stat().st_ino: "folder"}
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append(names.get(os.fstat(d).st_ino, "file")), fsync(d)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "file", "content")
    assert calls == ["file", "rename", "folder"]


@pytest.mark.parametrize(
    ("renames", "left"),
    [
        (0, {"model": "old", "model.tmp": "new"}),
        (1, {"model.old": "old", "model.tmp": "new"}),
        (2, {"model": "new"}),
    ],
)
def test_a_kill_between_two_renames_leaves_a_whole_folder(renames, left, tmp_path, monkeypatch):
    for name, text in (("model", "old"), ("model.tmp", "new")):
        write_atomic(tmp_path / name / "weights", text)
    rename, done = Path.rename, []

    def rename_or_stop(source: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(source)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", rename_or_stop)
    with contextlib.suppress(KeyboardInterrupt):
        replace_folder(tmp_path / "model.tmp", tmp_path / "model")
    assert {path.name: (path / "weights").read_text() for path in tmp_path.iterdir()} == left


def test_sha256_is_the_digest_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
