"""Accuracy in questions against a count in plain Python, and Winoground's definitions."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluate_worker import SEEN, a_model
from hypothesis import given
from hypothesis import strategies as st

from grr.data.formats.choices import Choices, Parts
from grr.data.formats.openmoji_tasks import openmoji_choices
from grr.evaluation.composition import choice_accuracy, count_ties
from grr.evaluation.outputs import compute_outputs

CPU = torch.device("cpu")


def questions(shapes: list[int]) -> Choices:
    """A question of as many images and captions as each shape, of which caption k belongs to image k; one image has
    two captions, and the first is right."""
    rows = []  # question, image, caption, right
    images = 0
    for q, n in enumerate(shapes):
        rows += [(q, images + i, f"text {q} {k}", i == k) for i in range(n) for k in range(max(2, n))]
        images += n
    captions = [text for _, _, text, _ in rows]
    pairs = Parts(None, [(f"{j}.png", None) for j in range(images)], captions, np.array([j for _, j, _, _ in rows]))
    numbers, right = np.array([q for q, *_ in rows]), np.array([r for *_, r in rows])
    return Choices(pairs, numbers, right, ["one", "several"], np.array([int(shapes[q] > 1) for q in numbers]))


def outputs_of(choices: Choices, cosine: list[float], likelihood: list[float], without: frozenset[int] = frozenset()):
    """Outputs with these scores; the pairs of the images `without` are missing."""
    texts = [t for t in range(len(choices)) if int(choices.image_of[t]) not in without]
    images = sorted({int(choices.image_of[t]) for t in texts})
    return SimpleNamespace(
        texts=texts,
        image_of_text=torch.tensor([images.index(int(choices.image_of[t])) for t in texts], dtype=torch.int64),
        image_embeddings=torch.ones(len(images), 1),
        text_embeddings=torch.tensor([[cosine[t]] for t in texts]),
        token_losses=-torch.tensor([likelihood[t] for t in texts], dtype=torch.float64),
    )


@given(data=st.data(), shapes=st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_accuracies_equal_a_count_of_winogrounds_definitions(data, shapes):
    choices = questions(shapes)
    some = st.lists(st.integers(0, 3).map(float), min_size=len(choices), max_size=len(choices))
    scores = {"cosine": data.draw(some), "likelihood": data.draw(some)}
    without = frozenset(data.draw(st.sets(st.integers(0, sum(shapes) - 1), max_size=2)))
    starts = [0, *itertools.accumulate(shapes)]
    kept = [q for q in range(len(shapes)) if not without & set(range(starts[q], starts[q + 1]))]
    outputs = outputs_of(choices, scores["cosine"], scores["likelihood"], without)
    if not kept:
        with pytest.raises(ValueError, match=f"got none of {len(shapes)}; raise run.images"):
            choice_accuracy(outputs, choices)
        return
    found = choice_accuracy(outputs, choices)
    assert (found["questions"], found["left_out"]) == (len(kept), len(shapes) - len(kept))
    start = [0, *itertools.accumulate(n * max(2, n) for n in shapes)]
    for name, score in scores.items():
        text, image, group = [], [], []
        for q in kept:
            n = shapes[q]
            s = np.array(score[start[q] : start[q + 1]]).reshape(n, max(2, n))  # [image, caption]
            text.append(all(s[i, i] > s[i, k] for i in range(n) for k in range(max(2, n)) if i != k))
            if n > 1:
                image.append(all(s[k, k] > s[i, k] for i in range(n) for k in range(n) if i != k))
                group.append(text[-1] and image[-1])
        for part, counted in (("text", text), ("image", image), ("group", group)):
            assert found.get(f"{name}_{part}") == (pytest.approx(np.mean(counted)) if counted else None)
    assert sum(one["questions"] for one in found["kinds"].values()) == len(kept)


@given(n=st.integers(1, 4), cut=st.integers(0, 4))
def test_ties_are_the_questions_whose_captions_are_the_same_tokens(tokenizer, n, cut):
    """The captions of the first questions differ in white space only, which encodes to the same tokens."""
    cut = min(cut, n)
    captions = [text for q in range(n) for text in ("a fox", "a  fox" if q < cut else "a bread")]
    pairs = Parts(None, [(f"{q}.png", None) for q in range(n)], captions, np.arange(n).repeat(2))
    choices = Choices(pairs, np.arange(n).repeat(2), np.tile([True, False], n), ["all"], np.zeros(2 * n, int))
    assert count_ties(choices, tokenizer) == cut


@pytest.mark.usefixtures("process_group")
@torch.no_grad()
def test_scores_of_a_model_are_those_of_separate_calls(tokenizer):
    """A wrong answer for each question is known from the cosine and the likelihood of single pairs."""
    model = a_model(tokenizer).double()
    choices = openmoji_choices(held_out=6)
    outputs = compute_outputs(model, choices, tokenizer, CPU, **SEEN)
    found = choice_accuracy(outputs, choices)
    model.eval()
    right = {"cosine": [], "likelihood": []}
    for q in range(12):
        cosine, likelihood = [], []
        for pair in (2 * q, 2 * q + 1):
            image = choices.load(pair, size=SEEN["image_size"], crop=SEEN["crop"]).unsqueeze(0)
            ids = torch.tensor([tokenizer.encode(choices.captions[pair])])
            output = model(image, ids[:, :-1])
            cosine.append(float(output.image_embeddings[0] @ output.text_embeddings[0]))
            special = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.bos_id)
            targets = [int(i) for i in ids[0, 1:] if i not in special]
            log_p = output.logits[0, : len(targets)].double().log_softmax(-1)
            likelihood.append(float(log_p[torch.arange(len(targets)), targets].sum()))
        right["cosine"].append(cosine[0] > cosine[1])
        right["likelihood"].append(likelihood[0] > likelihood[1])
    for name, answers in right.items():
        assert found[f"{name}_text"] == pytest.approx(np.mean(answers))
        assert found["kinds"]["objects"][f"{name}_text"] == pytest.approx(np.mean(answers[::2]))
        assert found["kinds"]["relation"][f"{name}_text"] == pytest.approx(np.mean(answers[1::2]))
