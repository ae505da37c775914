"""Classes by name against one sentence at a time through the model, and accuracy against counting in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.evaluation.zero_shot import TEMPLATES, accuracy, class_embeddings
from grr.models.builders import grr_coca_tiny
from grr.models.coca import CoCa
from grr.tokenizers import Tokenizer, train_tokenizer

CLASSES = ["fox", "red fox", "owl", "loaf of {bread}", "boat on a hill", "0-1"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    captions = [template.replace("{}", name) for name in CLASSES for template in TEMPLATES]
    return train_tokenizer(captions, tmp_path_factory.mktemp("t") / "t.model", vocab_size=100, context_length=32)


@pytest.fixture(scope="module")
def model(tok) -> CoCa:
    torch.manual_seed(0)
    return grr_coca_tiny(vocab_size=tok.vocab_size, context_length=32, dropout=0.5)


# --- class_embeddings ------------------------------------------------------------------------------------------------


@given(
    classes=st.lists(st.sampled_from(CLASSES), min_size=1, unique=True),
    templates=st.lists(st.sampled_from([*TEMPLATES, "{} {at sea}"]), min_size=1, max_size=6),
)
def test_a_class_embedding_is_the_normalised_mean_of_its_prompts(model, tok, classes, templates):
    found = class_embeddings(model.train(), tok, classes, CPU, templates=tuple(templates))
    assert model.training  # as it was before, and no dropout in between
    model.eval()
    assert found.shape == (len(classes), 64)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    for name, embedding in zip(classes, found, strict=True):
        parts = [template.split("{}") for template in templates]
        rows = [torch.tensor([tok.encode(before + name + after)[:-1]]) for before, after in parts]
        with torch.no_grad():
            total = sum(model.encode_text(row)[0].double() for row in rows)  # each alone, with all of its padding
        torch.testing.assert_close(embedding.double(), total / total.norm(), atol=1e-5, rtol=0)


def test_many_prompts_equal_those_of_single_classes(model, tok):
    """More descriptions than are embedded at a time, so that a class may begin in one batch and end in the next."""
    classes = [f"{word} {i}" for i in range(30) for word in ("fox", "owl on a boat")]
    templates = (*TEMPLATES, "{}", "a {}", "the {}")
    whole = class_embeddings(model, tok, classes, CPU, templates=templates)
    alone = torch.cat([class_embeddings(model, tok, [name], CPU, templates=templates) for name in classes])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=0)


@given(order=st.permutations(range(len(CLASSES))), turned=st.permutations(TEMPLATES))
def test_the_order_of_classes_does_not_change_their_embeddings(model, tok, order, turned):
    expected = class_embeddings(model, tok, CLASSES, CPU)[list(order)]
    moved = class_embeddings(model, tok, [CLASSES[i] for i in order], CPU, templates=tuple(turned))
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_images_go_to_the_class_whose_description_is_nearest(model, tok):
    """The way a user classifies: here, images that the model sees where it hears the names of three classes."""
    classes = class_embeddings(model, tok, CLASSES, CPU)
    labels = torch.tensor([2, 0, 5, 2])
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    nearby = torch.nn.functional.normalize(classes[labels] + 1e-3 * noise, dim=1)
    assert accuracy(nearby @ classes.T, labels) == {"top_1": 1.0, "top_5": 1.0, "mean_per_class": 1.0}


def test_invalid_names_and_templates_are_refused_with_a_remedy(model, tok):
    with pytest.raises(ValueError, match=r"classes must be a list of one name or more, got \[\]"):
        class_embeddings(model, tok, [], CPU)
    with pytest.raises(ValueError, match=r"classes must be a list of one name or more, got 'fox'"):
        class_embeddings(model, tok, "fox", CPU)
    with pytest.raises(ValueError, match=r"got 'owl', 'fox' more than once; add what is meant"):
        class_embeddings(model, tok, ["owl", "fox", "owl", "boat", "fox"], CPU)
    for templates, got in (((), "none"), (("a fox", "a {}", "{} {}"), "'a fox', '{} {}'"), ("a {}", "'a {}'")):
        with pytest.raises(
            ValueError, match=rf"texts that each contain {{}} once.*, got {got}; write .*\['a photo of a {{}}'"
        ):
            class_embeddings(model, tok, CLASSES, CPU, templates=templates)


# --- accuracy --------------------------------------------------------------------------------------------------------

tables = st.tuples(st.integers(1, 30), st.sampled_from([1, 2, 5, 6, 12]), st.integers(1, 40), st.integers(0, 999))


def table(n: int, c: int, levels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of few levels, so that many tie, and labels."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (n, c), generator=generator).float()
    return scores, torch.randint(0, c, (n,), generator=generator)


@given(table_of=tables)
def test_accuracy_equals_a_count_with_many_ties(table_of):
    scores, labels = table(*table_of)
    n, c = scores.shape
    ranks = []
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        ranks.append(sum(row[other] >= row[label] for other in range(c) if other != label))
    hits: dict[int, list[bool]] = {}
    for rank, label in zip(ranks, labels.tolist(), strict=True):
        hits.setdefault(label, []).append(rank == 0)
    expected = {"top_1": sum(rank == 0 for rank in ranks) / n}
    if c > 5:
        expected["top_5"] = sum(rank < 5 for rank in ranks) / n
    expected["mean_per_class"] = sum(sum(own) / len(own) for own in hits.values()) / len(hits)
    result = accuracy(scores, labels)
    assert list(result) == list(expected)
    assert result == pytest.approx(expected)


@given(table_of=tables, seed=st.integers(0, 999))
def test_accuracy_is_invariant_to_order_and_to_increasing_functions_of_scores(table_of, seed):
    scores, labels = table(*table_of)
    generator = torch.Generator().manual_seed(seed)
    images, classes = (torch.randperm(size, generator=generator) for size in scores.shape)
    moved = accuracy((3 * scores - 7)[images][:, classes], classes.argsort()[labels][images])
    assert moved == pytest.approx(accuracy(scores, labels))


@given(table_of=tables, times=st.integers(2, 4))
def test_classes_have_equal_weight_in_mean_per_class(table_of, times):
    scores, labels = table(*table_of)
    more = labels == labels[0]
    repeated = torch.cat([scores, *[scores[more]] * times]), torch.cat([labels, *[labels[more]] * times])
    assert accuracy(*repeated)["mean_per_class"] == pytest.approx(accuracy(scores, labels)["mean_per_class"])


@pytest.mark.parametrize("score", [0.0, math.nan, math.inf])
def test_equal_scores_of_all_classes_count_as_wrong(score):
    assert set(accuracy(torch.full((10, 10), score), torch.arange(10)).values()) == {0.0}


def test_scores_and_labels_that_do_not_fit_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"must be \[n, c\] and labels \[n\], n at least 1, got \[3, 4\] and \[2\]"):
        accuracy(torch.ones(3, 4), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"n at least 1, got \[0, 4\] and \[0\]"):
        accuracy(torch.ones(0, 4), torch.zeros(0).long())
    with pytest.raises(ValueError, match=r"labels must be from 0 to 3, .* got -1 to 4; leave out images without"):
        accuracy(torch.ones(3, 4), torch.tensor([-1, 0, 4]))
