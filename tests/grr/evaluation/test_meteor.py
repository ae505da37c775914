"""METEOR of NLTK against its formula, where WordNet is installed, and the error where it is not."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("nltk", reason='pip install "grr-coca[evaluate]"')
from grr.evaluation.metrics.meteor import meteor, open_wordnet

try:
    open_wordnet()
    installed = True
except FileNotFoundError:
    installed = False
needs_wordnet = pytest.mark.skipif(not installed, reason="python -m nltk.downloader wordnet")


def formula(matched: int, chunks: int, hypothesis: int, reference: int) -> float:
    """Lavie and Agarwal 2007, section 2: alpha 0.9, beta 3, gamma 0.5."""
    if not matched:
        return 0.0
    precision, recall = matched / hypothesis, matched / reference
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / matched) ** 3)


@needs_wordnet
@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a dog runs", "a dog runs", formula(3, 1, 3, 3)),
        ("a dog runs on grass", "A dog, on grass.", formula(4, 2, 4, 5)),
        ("a dog runs", "a dog ran", formula(3, 1, 3, 3)),  # forms of a word of WordNet
        ("two dogs running", "two dog runs", formula(3, 1, 3, 3)),  # equal stems
        ("a red car", "a red auto", formula(3, 1, 3, 3)),  # synonyms
        ("a red car", "a red automobile", formula(2, 1, 3, 3)),  # NLTK looks up the stem, "automobil"
        ("a dog", "trees", 0.0),
    ],
)
def test_meteor_is_its_formula_over_words_stems_and_synonyms(reference, hypothesis, expected):
    assert meteor([[reference]], [hypothesis]) == pytest.approx(expected, abs=1e-12)


@needs_wordnet
def test_the_best_reference_counts_and_images_are_averaged():
    assert meteor([["trees", "a dog"], ["a dog"]], ["a dog", "grass"]) == pytest.approx(formula(2, 1, 2, 2) / 2)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="must be as many, and at least one, got 1 and 0"):
        meteor([["a dog"]], [])


def test_missing_data_of_wordnet_are_named_with_the_command_that_gets_them(tmp_path):
    code = (
        "import nltk; nltk.data.path[:] = []; from grr.evaluation.metrics.meteor import meteor; meteor([['a']], ['a'])"
    )
    alone = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=alone)
    message = "FileNotFoundError: meteor: NLTK must find the data of WordNet, got none in nltk_data/"
    assert message in done.stderr
    assert "run `python -m nltk.downloader wordnet`, or remove meteor from run.tasks" in done.stderr
