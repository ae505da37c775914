"""VQA's accuracy against the mean over all choices of nine people, and its normalisation against a second one."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.evaluation.metrics.vqa import PUNCTUATION, normalise_answer, vqa_accuracy

WORDS = ["cat", "dog", "yes", "on", "3 dogs"]  # which normalisation does not change


@given(people=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), answer=st.sampled_from([*WORDS, "owl"]))
def test_the_accuracy_is_the_mean_over_all_choices_of_people_but_one(people, answer):
    others = list(combinations(people, len(people) - 1))
    mean = sum(min(1.0, sum(given == answer for given in some) / 3) for some in others) / len(others)
    assert vqa_accuracy(answer, people) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(("same", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_of_ten_people_four_make_an_answer_right(same, expected):
    assert vqa_accuracy("cat", ["cat"] * same + ["dog"] * (10 - same)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Two dogs.", "2 dogs"),
        ("a  cat, an owl", "cat owl"),
        ("none", "0"),
        ("ten", "10"),
        ("x-ray", "x ray"),  # a sign between words becomes a space
        ("x -ray", "x ray"),
        ("black/white", "black white"),
        ("1,000", "1000"),  # one between digits is left out
        ("2.5 m.", "2.5 m"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),  # as the official table has it
        ("lets", "lets"),
        ("the a an", ""),
    ],
)
def test_answers_are_normalised_as_the_official_evaluation_does(answer, normal):
    assert normalise_answer(answer) == normal


@given(text=st.text("ab ,.-/'?19T\u00e9", max_size=12))
def test_signs_are_removed_or_become_spaces_as_a_second_implementation_does(text):
    places = {sign: [i for i, c in enumerate(text) if c == sign] for sign in PUNCTUATION}
    beside = {s for s, found in places.items() for i in found if " " in (text[max(0, i - 1) : i], text[i + 1 : i + 2])}
    number = any(a.isdigit() and b == "," and c.isdigit() for a, b, c in zip(text, text[1:], text[2:], strict=False))
    kept = [("" if c in beside or number else " ") if c in PUNCTUATION else c for c in text]
    joined = "".join(kept)
    joined = "".join(c for i, c in enumerate(joined) if c != "." or joined[i + 1 : i + 2].isdigit())
    words = [word for word in joined.lower().split() if word not in ("a", "an", "the")]
    assert normalise_answer(text).split() == words


def test_answers_are_compared_as_they_are_if_all_people_agree():
    assert vqa_accuracy("dog", ["The dog"] * 10) == 0
    assert vqa_accuracy(" The dog\n", ["The dog"] * 10) == 1
    assert vqa_accuracy("dog", ["The dog"] * 9 + ["a cat"]) == 1


def test_a_question_without_answers_is_refused():
    with pytest.raises(ValueError, match=r"people must be a list of one answer or more, got \[\]"):
        vqa_accuracy("dog", [])
    with pytest.raises(ValueError, match="got 'dog'"):
        vqa_accuracy("dog", "dog")
