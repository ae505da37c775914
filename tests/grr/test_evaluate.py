"""Retrieval against a plain Python computation."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.retrieval import retrieval


def by_hand(image, text, image_of_text, k):
    n, m = len(image), len(text)
    score = (image.double() @ text.double().T).tolist()
    own = image_of_text
    texts = [sum(score[j][t] >= score[own[t]][t] for j in range(n) if j != own[t]) for t in range(m)]
    images = []
    for i in range(n):
        best = max((score[i][t] for t in range(m) if own[t] == i), default=None)
        if best is not None:
            images.append(sum(score[i][t] >= best for t in range(m) if own[t] != i))
    return sum(r < k for r in images) / len(images), sum(r < k for r in texts) / len(texts)


@given(owners=st.lists(st.integers(0, 6), min_size=1, max_size=20), levels=st.integers(1, 50), seed=st.integers(0, 999))
def test_recall_is_what_counting_by_hand_gives_with_ties_and_many_texts_an_image(owners, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, levels, (7, 3), generator=generator).float()  # few levels make many ties
    text = torch.randint(0, levels, (len(owners), 3), generator=generator).float()
    result = retrieval(image, text, torch.tensor(owners))
    for k in (1, 5, 10):
        expected = by_hand(image, text, owners, k)
        got = result[f"image_to_text_r{k}"], result[f"text_to_image_r{k}"]
        assert torch.allclose(torch.tensor(got), torch.tensor(expected))


def test_a_model_that_gives_one_embedding_for_everything_finds_nothing():
    same = torch.ones(20, 4)
    assert set(retrieval(same, same, torch.arange(20)).values()) == {0.0}


def test_a_perfect_model_finds_everything():
    assert set(retrieval(torch.eye(20), torch.eye(20), torch.arange(20)).values()) == {1.0}
