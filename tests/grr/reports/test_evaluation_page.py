"""An evaluation is kept whole, read easily, and its page needs nothing but itself."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.evaluation.examples import Caption, Examples, Match, Retrieval
from grr.reports.evaluation import Confusions, as_text, write_evaluation

RECALLS = {1: 0.25, 5: 0.5, 10: 1.0}
RESULTS = {
    "losses": {"loss": 3.0512, "contrastive_loss": 0.2626, "captioning_loss": 2.526, "perplexity": 12.5151,
               "contrastive_batch": 768, "contrastive_weight": 2.0, "captioning_weight": 1.0},
    "retrieval": {"num_eval_images": 1000, **{f"image_to_text_r{k}": recall for k, recall in RECALLS.items()},
                  **{f"text_to_image_r{k}": recall / 2 for k, recall in RECALLS.items()}},
    "captions": {"bleu_1": 0.7, "bleu_2": 0.6, "bleu_3": 0.5, "bleu_4": 0.4321, "rouge_l": 0.55, "cider": 1.234,
                 "exact": 0.01},
    "meteor": {"meteor": 0.321},
    "clip_score": {"clip_score": 0.75, "ref_clip_score": 0.8, "images": 1000, "truncated": 0, "judge": "runs/<judge>",
                   "judge_fingerprint": "abc", "judges_itself": False},
    "zero_shot": {"top_1": 0.6875, "top_5": 0.9, "mean_per_class": 0.7},
    "linear_probe": {"top_1": 0.8, "mean_per_class": 0.75, "strength": 1e-3},
}  # fmt: skip


def evaluation(**results: dict) -> dict:
    return {
        "model": {"path": "runs/<x>", "builder": "grr_coca", "parameters": 394_548_926, "precision": "float32"},
        "data": {
            "name": "coco",
            "split": "test",
            "images": 1000,
            "captions": 5000,
            "left_out": 2,
            "left_out_names": {"a.jpg#0": "cut"},
        },
        "labelled": None,
        "results": results,
    }


def examples() -> Examples:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    matches = [Match(image, 0.9, 1, False), Match(image, 0.1, 7, True)]
    retrieval = Retrieval("a fox & an <owl>", image, matches, [Match("an <owl>", 0.5, 1, True)])
    return Examples([retrieval], [Caption(image, "a <b>fox</b>", ["a fox"])])


def confusions() -> Confusions:
    return Confusions(["fox", "<owl>", "cat"], torch.tensor([[7, 3, 0], [0, 5, 0], [1, 0, 0]]))


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_confusions_are_counts_of_what_is_shown_and_what_it_is_taken_for(pairs):
    shown, taken = zip(*pairs, strict=True)
    scores = torch.nn.functional.one_hot(torch.tensor(taken), 5).float()
    counts = Confusions.of(list("abcde"), scores, torch.tensor(shown)).counts
    assert counts.tolist() == [[pairs.count((i, j)) for j in range(5)] for i in range(5)]


def test_the_file_is_the_evaluation_and_what_is_no_number_becomes_null(tmp_path):
    given_one = evaluation(losses=RESULTS["losses"] | {"perplexity": float("nan"), "loss": float("inf")})
    write_evaluation(tmp_path / "run", given_one, None, None)
    kept = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert set(kept.pop("made")) == {"time", "grr", "torch", "device"}
    assert kept["results"]["losses"]["perplexity"] is kept["results"]["losses"]["loss"] is None
    assert {key: kept[key] for key in ("model", "data", "labelled")} == {
        key: given_one[key] for key in ("model", "data", "labelled")
    }
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["evaluation.html", "evaluation.json"]


def test_the_page_shows_all_parts_quotes_what_it_is_given_and_loads_nothing(tmp_path):
    page = write_evaluation(tmp_path, evaluation(**RESULTS), examples(), confusions()).read_text()
    for text in (
        "grr_coca on coco (test)",
        "394,548,926 parameters",
        "1,000 images, 5,000 captions, 2 left out",
        "3.051",
        "12.52",
        "68.8\u202f%",
        "1.234",
        "CIDEr-D from 0 to 10",
        "fox predicted as &lt;owl&gt;: 3 of 10",
        "a fox &amp; an",
        "a &lt;b&gt;fox&lt;/b&gt;",
        "</html>",
    ):
        assert text in page, text
    assert "<owl>" not in page
    assert "<b>fox" not in page
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\' >)]+)', page)
    assert sources
    assert all(source.startswith("data:image/jpeg") for source in sources)


def test_a_page_of_few_tasks_has_no_empty_parts(tmp_path):
    page = write_evaluation(tmp_path, evaluation(retrieval=RESULTS["retrieval"]), Examples([], []), None).read_text()
    assert "Retrieval" in page
    for text in ("Losses", "Captions<", "Classes", "Confusion", "Retrieval in both directions"):
        assert text not in page


def test_many_classes_are_told_and_not_drawn(tmp_path):
    few, many = (Confusions([f"c{i}" for i in range(n)], torch.eye(n, dtype=torch.int64).roll(1, 0)) for n in (5, 200))
    assert "<svg" in write_evaluation(tmp_path, evaluation(**RESULTS), None, few).read_text()
    page = write_evaluation(tmp_path, evaluation(**RESULTS), None, many).read_text()
    assert "<svg" not in page
    assert page.count(" predicted as c") == 12


@pytest.mark.parametrize("task", RESULTS)
def test_a_terminal_shows_each_task_in_columns_of_one_width(task):
    first, left_out, blank, title, *table = as_text(evaluation(**{task: RESULTS[task]})).splitlines()
    assert (first, blank) == ("grr_coca on coco (test): 1,000 images, 5,000 captions, 2 left out", "")
    assert left_out == "data: 2 left out; evaluation.json lists them with their causes as data.left_out_names"
    assert title.partition(":")[0] in ("Losses", "Retrieval", "Captions", "METEOR", "CLIPScore", "Classes")
    assert table[0].split()
    assert {len(line) for line in table if line} == {len(table[1])}


def test_captions_longer_than_the_context_are_counted_and_a_model_that_judges_itself_is_named(tmp_path):
    given_one = evaluation(clip_score=RESULTS["clip_score"])
    assert "itself" not in as_text(given_one)
    assert "cut" not in as_text(given_one)
    given_one["data"] |= {"truncated": 4321, "max_tokens": 74}
    given_one["results"]["clip_score"] |= {"judges_itself": True, "truncated": 17}
    text = as_text(given_one)
    assert "5,000 captions, of which 4,321 are cut to 74 tokens, 2 left out" in text.splitlines()[0]
    assert "by runs/<judge>, which is the evaluated model itself: that flatters it; 17 captions and references" in text
    page = write_evaluation(tmp_path, given_one, None, None).read_text()
    assert "by runs/&lt;judge&gt;, which is the evaluated model itself" in page
    assert "4,321 are cut to 74 tokens" in page


def test_without_pairs_it_is_named_after_the_labelled_data(tmp_path):
    only = evaluation(zero_shot=RESULTS["zero_shot"])
    only["labelled"], only["data"] = {"name": "image_folder", "images": 50, "left_out": 0}, None
    assert as_text(only).splitlines()[0] == "grr_coca on image_folder: 50 images"
    assert "grr_coca on image_folder" in write_evaluation(tmp_path, only, None, None).read_text()
