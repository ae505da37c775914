"""Caption metrics against their formulas, against the official Java pipeline's numbers, and under hostile captions."""

import json
import math
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.evaluation.captions import bleu, caption_metrics, cider, rouge_l, split_words, treebank

pytest.importorskip("nltk", reason='pip install "grr-coca[evaluate]"')
captions = st.lists(st.sampled_from(["two", "dogs", "the", "dog", "run", "grass"]), max_size=8).map(" ".join)
images = st.tuples(st.lists(captions, min_size=1, max_size=4), captions)
corpora = st.lists(images, min_size=1, max_size=6).map(lambda rows: tuple(map(list, zip(*rows, strict=True))))
METRICS = (bleu, rouge_l, cider)


@given(corpus=corpora, random=st.randoms(use_true_random=False))
def test_neither_the_order_of_images_nor_that_of_references_matters(corpus, random):
    references, hypotheses = corpus
    order = random.sample(range(len(hypotheses)), len(hypotheses))
    shuffled = [random.sample(references[i], len(references[i])) for i in order]
    again = caption_metrics(shuffled, [hypotheses[i] for i in order])
    assert again == pytest.approx(caption_metrics(references, hypotheses), rel=1e-9, abs=1e-12)


@given(corpus=corpora)
def test_bleu_and_rouge_lie_between_0_and_1_and_cider_between_0_and_10(corpus):
    metrics = caption_metrics(*corpus)
    assert list(metrics) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
    for name, value in metrics.items():
        assert 0 <= value <= (10 + 1e-9 if name == "cider" else 1), name


@given(corpus=corpora)
def test_all_metrics_at_once_are_the_metrics_one_by_one(corpus):
    metrics = caption_metrics(*corpus)
    assert list(metrics.values()) == [*bleu(*corpus), rouge_l(*corpus), cider(*corpus)]


@given(corpus=corpora, places=st.lists(st.integers(0, 99), min_size=6, max_size=6))
def test_to_repeat_a_reference_is_perfect(corpus, places):
    references = [[f"{caption} in deep snow today" for caption in own] for own in corpus[0]]  # four words or more
    hypotheses = [own[place % len(own)] for own, place in zip(references, places, strict=False)]
    assert bleu(references, hypotheses) == pytest.approx((1, 1, 1, 1), abs=1e-8)
    assert rouge_l(references, hypotheses) == pytest.approx(1)


@given(lengths=st.lists(st.integers(4, 9), min_size=2, max_size=6))
def test_to_repeat_references_that_share_no_word_is_a_cider_of_10(lengths):
    hypotheses = [" ".join(f"w{i}x{j}" for j in range(length)) for i, length in enumerate(lengths)]
    assert cider([[h] for h in hypotheses], hypotheses) == pytest.approx(10)


@given(corpus=corpora, silence=st.sampled_from(["", "  ", ".", "\n", "... !"]))
def test_an_empty_caption_scores_0(corpus, silence):
    references, hypotheses = corpus
    assert set(caption_metrics(references, [silence] * len(hypotheses)).values()) == {0.0}


@given(corpus=corpora, extra=captions)
def test_another_reference_never_lowers_rouge(corpus, extra):
    references, hypotheses = corpus
    assert rouge_l([[*own, extra] for own in references], hypotheses) >= rouge_l(references, hypotheses) - 1e-12


@given(corpus=corpora)
def test_capitals_white_space_and_punctuation_do_not_matter(corpus):
    references, hypotheses = corpus
    dressed = [[f" {r.upper()} ,\n" for r in own] for own in references]
    assert caption_metrics(dressed, [f"{h.title()}.\n" for h in hypotheses]) == caption_metrics(references, hypotheses)


@given(references=st.lists(st.text(max_size=60), min_size=1, max_size=3), hypothesis=st.text(max_size=60))
def test_any_text_can_be_scored(references, hypothesis):
    assert all(map(math.isfinite, caption_metrics([references, ["a dog"]], [hypothesis, hypothesis]).values()))


# --- each formula once more, slowly ----------------------------------------------------------------------------------


def grams(text: str, n: int) -> list[str]:
    words = text.split()
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


@given(corpus=corpora.filter(lambda corpus: any(len(h.split()) >= 4 for h in corpus[1])))
def test_bleu_is_papineni_s_formula_with_the_closest_length(corpus):
    references, hypotheses = corpus
    c = sum(len(h.split()) for h in hypotheses)
    r = 0
    for own, h in zip(references, hypotheses, strict=True):
        lengths = sorted(len(x.split()) for x in own)
        r += min(lengths, key=lambda length: abs(length - len(h.split())))  # of two, the shorter
    log_precisions = []
    for n in range(1, 5):
        clipped = total = 0
        for own, h in zip(references, hypotheses, strict=True):
            for gram in set(grams(h, n)):
                clipped += min(grams(h, n).count(gram), max(grams(x, n).count(gram) for x in own))
            total += len(grams(h, n))
        log_precisions.append(math.log(clipped / total) if clipped else -math.inf)
    log_penalty = min(0.0, 1 - r / c)
    expected = [math.exp(log_penalty + sum(log_precisions[:n]) / n) for n in range(1, 5)]
    assert bleu(references, hypotheses) == pytest.approx(expected, abs=2e-4)  # COCO's zero is (1e-15) ** (1 / 4)


def is_subsequence(part: tuple[str, ...], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


@given(corpus=corpora)
def test_rouge_l_is_that_of_the_longest_of_all_subsequences(corpus):
    total = 0.0
    for own, h in zip(*corpus, strict=True):
        words = h.split()
        parts = [part for size in range(len(words) + 1) for part in combinations(words, size)]
        common = [max(len(part) for part in parts if is_subsequence(part, r.split())) for r in own]
        if max(common) > 0:
            precision = max(lcs / len(words) for lcs in common)
            recall = max(lcs / len(r.split()) for lcs, r in zip(common, own, strict=True) if r)
            total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l(*corpus) == pytest.approx(total / len(corpus[1]))


@given(corpus=corpora)
def test_cider_d_is_its_formula_over_dense_vectors(corpus):
    """CIDEr-D_n(c, S) = 10/m sum_j exp(-(l(c) - l(s_j))^2 / 2 sigma^2) min(g(c), g(s_j)) . g(s_j) / |g(c)| |g(s_j)|."""
    references, hypotheses = corpus
    total = 0.0
    for n in range(1, 5):
        every = sorted(
            {gram for own, h in zip(references, hypotheses, strict=True) for x in [*own, h] for gram in grams(x, n)}
        )
        found = np.array([sum(any(gram in grams(x, n) for x in own) for own in references) for gram in every])
        idf = np.log(len(references) / np.maximum(1, found))

        def g(text: str, n: int = n, every: list[str] = every, idf: np.ndarray = idf) -> np.ndarray:
            return np.array([grams(text, n).count(gram) for gram in every]) * idf

        for own, h in zip(references, hypotheses, strict=True):
            for s in own:
                size = np.linalg.norm(g(h)) * np.linalg.norm(g(s))
                cosine = np.minimum(g(h), g(s)) @ g(s) / size if size else 0.0
                difference = len(grams(h, 2)) - len(grams(s, 2))
                total += 10 / len(own) * math.exp(-(difference**2) / (2 * 6**2)) * cosine / 4
    assert cider(references, hypotheses) == pytest.approx(total / len(hypotheses), abs=1e-12)


# --- the official pipeline -------------------------------------------------------------------------------------------


def test_the_numbers_and_words_of_the_official_pipeline_on_500_images(shared_data):
    golden = json.loads((shared_data / "metrics/golden_flickr8k_human500.json").read_text())
    assert len(golden["hyp"]) == golden["scores"]["n"] == 500
    for key, hypothesis in golden["hyp"].items():
        assert " ".join(split_words(hypothesis)) == golden["ptb_hyp"][key]
        assert [" ".join(split_words(r)) for r in golden["refs"][key]] == golden["ptb_refs"][key]
    references, hypotheses = zip(*((golden["refs"][key], golden["hyp"][key]) for key in golden["hyp"]), strict=True)
    metrics = caption_metrics(list(references), list(hypotheses))
    names = {
        "bleu_1": "Bleu_1",
        "bleu_2": "Bleu_2",
        "bleu_3": "Bleu_3",
        "bleu_4": "Bleu_4",
        "rouge_l": "ROUGE_L",
        "cider": "CIDEr",
    }
    assert metrics == pytest.approx({name: golden["scores"][theirs] for name, theirs in names.items()}, abs=1e-9)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (
            "Solid lesion with thick wall. In the region (arrow)",
            "solid lesion with thick wall in the region -lrb- arrow -rrb-",
        ),
        ("view of St. Louis with Mr. Smith vs. the team", "view of st. louis with mr. smith vs. the team"),
        ("A crowd in Washington D.C.", "a crowd in washington d.c."),
        ("it is 5 p.m. in the U.S. today", "it is 5 p.m. in the u.s. today"),
        ("on the 2. a dog.... and 3.5 a.com", "on the 2 a dog and 3.5 a.com"),
        ("a man – a dog — a cat…", "a man a dog a cat"),
        ("A sign says “don’t stop”.", "a sign says do n't stop"),
        ("they can't, the dogs' bones; it's John's", "they ca n't the dogs bones it 's john 's"),
        ("8:25, $5 & 12,000 half-pipes -- 50% # 7", "8:25 $ 5 & 12,000 half-pipes 50 % # 7"),
        ("a <unk> dog, <UNK>.", "a <unk> dog <unk>"),
        ("un<unk>ed <unk><unk> <s>a</s> <unk>'s", "un <unk> ed <unk> <unk> <s> a </s> <unk> 's"),
        ("a < b > c <3 <|endoftext|> <a b>", "a < b > c < 3 < | endoftext | > <a b>"),
        ("a dog! a dog!!! what?! (!) ??", "a dog a dog !!! what ?! -lrb- -rrb- ??"),
        ("wow !! ! ? dog.!!", "wow !! dog !!"),
        ("[a] {b} ( c )", "-lsb- a -rsb- -lcb- b -rcb- -lrb- c -rrb-"),
        ("dog.... ..a 'quoted' `it` \"so\"", "dog a quoted it so"),
        ("fig. 3 and no. 5, no. the sun. jan. 1st", "fig. 3 and no. 5 no the sun jan. 1st"),
        ("AT&T's R&B & me@here.com #tag @user", "at&t 's r&b & me@here.com #tag @user"),
        ("a -b- c a=b 5~6 5° ½ cup €5", "a b c a = b 5 ~ 6 5 ° 1/2 cup $ 5"),
        ("well- 8:25am wouldn't've &amp; 😀 dog", "well 8:25 am would n't 've & dog"),
    ],
)
def test_words_are_those_of_stanford_s_tokenizer(caption, words):
    """As edu.stanford.nlp.process.PTBTokenizer 3.4.1 -lowerCase prints them, less COCO's punctuation."""
    assert split_words(caption) == words.split()


# --- what cannot be judged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [*METRICS, caption_metrics])
def test_references_that_do_not_fit_are_refused_with_a_remedy(metric):
    who = metric.__name__
    with pytest.raises(
        ValueError, match=rf"{who}: references and hypotheses must be as many.* got 1 and 2; references"
    ):
        metric([["a"]], ["a", "b"])
    with pytest.raises(ValueError, match=rf"{who}: .* at least one, got 0 and 0"):
        metric([], [])
    with pytest.raises(
        ValueError, match=rf"{who}: references\[1\] must be .* got \[\]; .* leave out images that nobody"
    ):
        metric([["a"], []], ["a", "b"])
    with pytest.raises(ValueError, match=rf"{who}: references\[0\] must be .* got 'a dog'; put a single caption into"):
        metric(["a dog"], ["a dog"])


def test_without_nltk_the_error_names_the_extra(monkeypatch):
    treebank.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    with pytest.raises(ImportError, match=r'need NLTK, which is not installed; pip install "grr-coca\[evaluate\]"'):
        caption_metrics([["a fox"]], ["an owl"])
