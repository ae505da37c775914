"""The loss, gradients and accuracy of a step depend on the global batch alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grr.data import Batch, Labelled, Pairs
from grr.data.collate import IGNORE, collate_captions
from grr.data.images import BadImage
from grr.data.pairs import Texts
from grr.evaluation.classification import answers, classification_scores, classification_step
from grr.models.builders import grr_coca_tiny
from grr.models.heads import image_classifier, image_text_classifier
from grr.tokenizers import train_tokenizer

pytestmark = pytest.mark.usefixtures("process_group")


def samples(seed: int, count: int = 8) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """Images, rows of ids, and classes, two of which may be IGNORE."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, 14, (count,), generator=generator).tolist()
    tokens = [torch.randint(3, 510, (n,), generator=generator).tolist() for n in lengths]
    classes = torch.randint(0, 3, (count,), generator=generator)
    classes[torch.randint(0, count, (2,), generator=generator)] = IGNORE
    return images, [[510, *t, 1, *[0] * (13 - len(t)), 511, 0] for t in tokens], classes


def split(images: torch.Tensor, rows: list[list[int]], classes: torch.Tensor, pieces: int) -> list[Batch]:
    size = len(rows) // pieces
    cuts = [slice(i * size, (i + 1) * size) for i in range(pieces)]
    return [Batch(images[c], *collate_captions(rows[c]), [str(i) for i in range(size)], 0, classes[c]) for c in cuts]


def head(seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    build = image_text_classifier if seed % 2 else image_classifier
    return build(grr_coca_tiny(dropout=dropout), 3, dropout=dropout).double()


@settings(max_examples=12)
@given(pieces=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 99), label_smoothing=st.sampled_from([0.0, 0.2]))
def test_any_split_has_the_loss_gradients_and_accuracy_of_the_whole_batch(pieces, seed, label_smoothing):
    model = head(seed)
    images, rows, classes = samples(seed)
    logits = model(images, torch.tensor(rows)[:, :-1])
    loss = F.cross_entropy(logits.float(), classes, ignore_index=IGNORE, label_smoothing=label_smoothing)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    scores = classification_step(model, split(images, rows, classes, pieces), 0, label_smoothing=label_smoothing).read()
    assert scores.loss == pytest.approx(loss.item(), rel=1e-5)
    assert scores.accuracy == (logits.argmax(-1) == classes).double().mean().item()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


class Noise(Pairs):
    """Pictures of noise, each with its own text; every third from number `bad` on cannot be read."""

    def __init__(self, texts: list[str], bad: int) -> None:
        super().__init__(Texts.of(map(str, range(len(texts)))), Texts.of(texts), np.arange(len(texts)))
        self.bad = bad

    def load(self, i: int, *, size: int, crop: str) -> torch.Tensor:
        if i >= self.bad and (i - self.bad) % 3 == 0:
            raise BadImage("cut off")
        generator = torch.Generator().manual_seed(i)
        return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)


TEXTS = ["is it", "what is it", "is this it"]


def noise(count: int, bad: int) -> Labelled:
    """Samples of three classes, one in four of no class."""
    labels = np.arange(count) % 4 - 1
    labels[labels < 0] = IGNORE
    return Labelled(Noise([TEXTS[i % 3] for i in range(count)], bad), ["a", "b", "c"], labels)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS * 10, tmp_path_factory.mktemp("words") / "words", context_length=16)


@settings(max_examples=6)
@given(count=st.integers(1, 120), bad=st.integers(1, 120), seed=st.integers(0, 99))
def test_scores_equal_those_of_single_readable_samples(tokenizer, count, bad, seed):
    model, data = head(seed, dropout=0.5).train(), noise(count, bad)
    scores = classification_scores(model, data, tokenizer, torch.device("cpu"), image_size=32, crop="squash")
    assert model.training
    model.eval()
    rows, classes = [], []
    for i in (i for i in range(count) if i < bad or (i - bad) % 3):
        ids = torch.tensor([tokenizer.encode(data.captions[i])])[:, :-1]
        rows.append(model(data.load(i, size=32, crop="squash")[None], ids).detach().float())
        classes.append(data.labels[i])
    logits, classes = torch.cat(rows), torch.tensor(classes)
    loss = F.cross_entropy(logits, classes, ignore_index=IGNORE, reduction="sum") / max(1, (classes >= 0).sum())
    assert scores.loss == pytest.approx(loss.item(), rel=1e-5)
    assert scores.accuracy == (logits.argmax(-1) == classes).double().mean().item()


@settings(max_examples=6)
@given(count=st.integers(1, 120), bad=st.integers(1, 120), seed=st.integers(0, 99))
def test_the_vqa_accuracy_credits_the_answers_of_single_readable_samples(tokenizer, count, bad, seed):
    """Ten answers of each question: i % 6 times class a, then b and c in turn; 0.3 for each of the first three."""
    model, data = head(seed).eval(), noise(count, bad)
    given_a = [["a"] * (i % 6) + [*"bc" * 5][: 10 - i % 6] for i in range(count)]
    data.people = Texts.of("\n".join(answers) for answers in given_a)
    scores = classification_scores(model, data, tokenizer, torch.device("cpu"), image_size=32, crop="squash")
    credit = []
    for i in (i for i in range(count) if i < bad or (i - bad) % 3):
        ids = torch.tensor([tokenizer.encode(data.captions[i])])[:, :-1]
        answer = "abc"[model(data.load(i, size=32, crop="squash")[None], ids).argmax()]
        credit.append(min(10, 3 * given_a[i].count(answer)) / 10)
    assert scores.vqa_accuracy == pytest.approx(sum(credit) / len(credit))
    assert scores.numbers().keys() == {"loss", "accuracy", "vqa_accuracy"}
    data.people = None
    scores = classification_scores(model, data, tokenizer, torch.device("cpu"), image_size=32, crop="squash")
    assert scores.numbers().keys() == {"loss", "accuracy"}


def test_data_without_readable_images_are_refused(tokenizer):
    with pytest.raises(ValueError, match="one image must be readable, got none: 0: cut off; check the"):
        classification_scores(head(0), noise(1, 0), tokenizer, torch.device("cpu"), image_size=32, crop="squash")


@pytest.mark.parametrize("build", [image_classifier, image_text_classifier])
def test_a_head_learns_from_the_image_or_from_image_and_text_together(build):
    """Is the image dark or light; or, is it what the text says: then neither alone tells more than chance."""
    together = build is image_text_classifier
    generator = torch.Generator().manual_seed(0)

    def batch(count: int) -> Batch:
        light, said = torch.randint(0, 2, (2, count), generator=generator)
        pixels = torch.randint(0, 128, (count, 3, 32, 32), generator=generator) + 128 * light.view(-1, 1, 1, 1)
        texts = [[510, 7 + word, 1, *[0] * 12, 511, 0] for word in said.tolist()]
        classes = (light == said).long() if together else light
        return Batch(pixels.to(torch.uint8), *collate_captions(texts), [""] * count, 0, classes)

    torch.manual_seed(0)
    model = build(grr_coca_tiny(), 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    never_seen = batch(64)

    def accuracy() -> float:
        with torch.no_grad():
            logits = model(never_seen.images, never_seen.ids, positions=never_seen.positions)
        return (logits.argmax(-1) == never_seen.classes).double().mean().item()

    assert accuracy() < 0.7
    for step in range(60):
        classification_step(model, [batch(32)], step).read()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy() > 0.95


@settings(max_examples=6)
@given(seed=st.integers(0, 99), label_smoothing=st.sampled_from([0.0, 0.2]))
def test_micro_batches_of_any_size_have_the_same_gradients_with_dropout(seed, label_smoothing):
    model = head(seed, dropout=0.3)
    found = []
    for pieces in (1, 2, 4, 8):
        scores = classification_step(model, split(*samples(seed), pieces), seed, label_smoothing=label_smoothing).read()
        found.append((scores, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    (expected, exact), *others = found
    for scores, gradients in others:
        assert scores == pytest.approx(expected, rel=1e-12)
        for name, gradient in exact.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


def test_dropout_depends_on_the_step_and_the_index_of_a_sample():
    model = head(1, dropout=0.5)
    batches = split(*samples(0), 2)
    first = classification_step(model, batches, 7).read()
    torch.manual_seed(123)  # whatever was drawn before
    assert classification_step(model, batches, 7).read() == first
    assert classification_step(model, batches, 8).read() != first
    twice = classification_step(model, [batches[0], batches[0]], 7).read()
    assert twice.loss != pytest.approx(classification_step(model, [batches[0]], 7).read().loss, rel=1e-6)


def test_a_batch_without_classes_has_no_gradient():
    model = head(0)
    images, rows, classes = samples(0)
    assert classification_step(model, split(images, rows, torch.full_like(classes, IGNORE), 2), 0).read() == (0.0, 0.0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_answers_are_those_of_the_model_to_readable_images(tokenizer):
    data = noise(30, 0)
    model = image_text_classifier(grr_coca_tiny(dropout=0.5), 3, dropout=0.5).train()
    shown = answers(model, data, tokenizer, torch.device("cpu"), image_size=32, crop="squash")
    assert model.training
    assert 10 <= len(shown) <= 20
    assert {one.right for one in shown} == {None, "a", "b", "c"}
    model.eval()
    for one in shown:
        ids = torch.tensor([tokenizer.encode(one.text)])[:, :-1]
        assert one.given == "abc"[model(one.image[None], ids).argmax()]
        (i,) = [i for i in range(30) if i % 3 and data.thumbnail(i).equal(one.image)]
        assert one.text == data.captions[i]
        assert one.right == (None if data.labels[i] == IGNORE else "abc"[data.labels[i]])


def test_data_without_classes_are_refused():
    batch = split(*samples(0), 1)[0]
    batch.classes = None
    with pytest.raises(ValueError, match=r"classification: the data must have classes, got none; use a data"):
        classification_step(head(0), [batch], 0).read()
