"""T5's vocabulary is copied whole, or refused."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from grr.cli import main
from grr.tokenizers import Tokenizer
from grr.tokenizers.vocabulary import fetch_t5


def test_the_downloaded_file_is_stored_and_a_changed_one_is_refused(shared_data, tmp_path):
    source = shared_data / "t5/spiece.model"
    output = fetch_t5(source, tmp_path / "deep" / "spiece.model")
    assert output.read_bytes() == source.read_bytes()
    assert Tokenizer(output).vocab_size == 32_102
    assert fetch_t5("a path that is not read", output) == output  # the output exists already
    changed = bytearray(source.read_bytes())
    changed[1000] ^= 1
    (tmp_path / "changed.model").write_bytes(changed)
    with pytest.raises(ValueError, match=r"changed.model must be spiece.model of google-t5/t5-base, whose sha256 is"):
        fetch_t5(tmp_path / "changed.model", tmp_path / "other.model")
    assert not (tmp_path / "other.model").exists()


def test_another_file_is_not_overwritten_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"mine exists and is not T5's vocabulary; name another file"):
        fetch_t5(None, tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone"):
        fetch_t5(tmp_path / "gone", tmp_path / "spiece.model")


def test_without_a_file_and_without_the_hub_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "grr-coca\[hub\]", or download .*: grr tokenizer fetch FILE'):
        fetch_t5(None, tmp_path / "spiece.model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that returns the files of a folder, raises ConnectionError for others, and lists the requests."""
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if not (tmp_path / "hub" / file).is_file():
            raise ConnectionError("no route to host\nNameResolutionError")
        return str(tmp_path / "hub" / file)

    (tmp_path / "hub").mkdir()
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    return asked


def test_the_file_of_the_hub_is_verified_as_a_local_one_is(shared_data, tmp_path, hub):
    whole = (shared_data / "t5/spiece.model").read_bytes()
    for data, taken in ((whole[:-1], False), (whole, True)):
        (tmp_path / "hub/spiece.model").write_bytes(data)
        assert main(["tokenizer", "fetch", "--output", str(tmp_path / "mine.model")]) == (0 if taken else 1)
        assert (tmp_path / "mine.model").exists() == taken
    assert (tmp_path / "mine.model").read_bytes() == whole
    assert hub == [("google-t5/t5-base", "spiece.model")] * 2


def test_without_network_the_error_is_one_line_with_a_remedy(tmp_path, hub, capsys):
    assert main(["tokenizer", "fetch", "--output", str(tmp_path / "mine.model")]) == 1
    assert capsys.readouterr().err == (
        "grr tokenizer fetch: fetch_t5: spiece.model of google-t5/t5-base was not downloaded from the Hugging Face hub "
        "(no route to host NameResolutionError); download it elsewhere, and name the file: grr tokenizer fetch FILE\n"
    )
    assert not (tmp_path / "mine.model").exists()


def test_the_real_hub_without_network_raises_the_same_error(tmp_path):
    pytest.importorskip("huggingface_hub", reason='pip install "grr-coca[hub]"')
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "grr.cli", "tokenizer", "fetch"],
        cwd=tmp_path,
        env=offline,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "fetch_t5: spiece.model of google-t5/t5-base was not downloaded from the Hugging Face hub (" in done.stderr
    assert "Traceback" not in done.stderr
