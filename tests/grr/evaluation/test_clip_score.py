"""CLIPScore against its published formula in float64, torchmetrics, and single calls of a judge."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluate_worker import SEEN, Noise, a_model, several_captions
from hypothesis import given
from hypothesis import strategies as st

from grr.evaluation.metrics.clip_score import PROMPT, clip_scores, judged_captions
from grr.evaluation.outputs import compute_outputs
from grr.tokenizers import Tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")


def published(image: np.ndarray, caption: np.ndarray, references: np.ndarray) -> tuple[float, float]:
    """CLIPScore and RefCLIPScore of one caption, as equations 1 to 3 of the paper say: [e], [e], [r, e]."""
    image, caption, *references = (x / np.sqrt((x**2).sum()) for x in (image, caption, *references))
    clip = 2.5 * max(float(image @ caption), 0)
    nearest = max(max(float(reference @ caption) for reference in references), 0)
    return clip, 0.0 if clip == nearest == 0 else 2 / (1 / max(clip, 1e-300) + 1 / max(nearest, 1e-300))


@given(seed=st.integers(0, 999), counts=st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_scores_are_the_published_formula_in_float64(seed, counts):
    """Embeddings of three dimensions, so that many cosines are negative; of any length, and references in any order."""
    generator = torch.Generator().manual_seed(seed)
    n = len(counts)
    images, captions = (torch.randn(n, 3, generator=generator) for _ in range(2))
    owners = torch.arange(n).repeat_interleave(torch.tensor(counts))
    owners = owners[torch.randperm(len(owners), generator=generator)]
    references = 7 * torch.randn(len(owners), 3, generator=generator)
    scores = clip_scores(images, captions, references, owners)
    assert scores.clip.dtype == scores.ref_clip.dtype == torch.float64
    for i in range(n):
        own = references[owners == i].double().numpy()
        expected = published(images[i].double().numpy(), captions[i].double().numpy(), own)
        assert (scores.clip[i].item(), scores.ref_clip[i].item()) == pytest.approx(expected, abs=1e-12)


def test_opposite_captions_score_0_and_a_perfect_one_2_and_a_half():
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    scores = clip_scores(image, torch.tensor([[-1.0, 0.0], [2.0, 0.0]]), image, torch.tensor([0, 1]))
    assert scores.clip.tolist() == [0, 2.5]
    assert scores.ref_clip.tolist() == pytest.approx([0, 2 * 2.5 / 3.5])


def test_embeddings_whose_shapes_do_not_fit_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"image_of_reference \[m\], got \[2, 3\], \[2, 3\], \[2, 3\] and \[3\]"):
        clip_scores(x, x, x, torch.tensor([0, 1, 1]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """The words of the captions and of the prompt, so that a caption with it fits into the context."""
    texts = [PROMPT + caption for caption in Noise(several_captions(60)).captions]
    return train_tokenizer(texts, tmp_path_factory.mktemp("words") / "words", vocab_size=160, context_length=16)


@pytest.fixture(scope="module")
def judge(tokenizer):
    return a_model(tokenizer, seed=5).double().eval()


@pytest.fixture(scope="module")
def outputs(tokenizer):
    """Captions that another model than the judge wrote; images have one to three references."""
    pairs = Noise(several_captions(60), bad=(3,), silent=(0,))
    return compute_outputs(a_model(tokenizer), pairs, tokenizer, CPU, generation={"max_new_tokens": 6}, **SEEN)


def embedded(judge, tokenizer, text: str) -> torch.Tensor:
    return judge.encode_text(torch.tensor([tokenizer.encode(PROMPT + text)])[:, :-1])[0]


@torch.no_grad()
def test_a_judge_gives_the_mean_of_single_calls_over_the_images_it_can_read(judge, tokenizer, outputs):
    pairs = Noise(several_captions(60), bad=(3, 8), silent=(0,))  # the judge cannot read image 8
    found = judged_captions(judge, tokenizer, pairs, outputs, CPU, **SEEN)
    expected = []
    for i, written, references in zip(outputs.images, outputs.written, outputs.references, strict=True):
        if int(pairs.image_of[i]) != 8:
            image = judge.encode_image(pairs.load(i, size=32, crop="squash")[None])[0]
            texts = [embedded(judge, tokenizer, text).numpy() for text in (written, *references)]
            expected.append(published(image.numpy(), texts[0], np.stack(texts[1:])))
    assert found["images"] == len(expected) == len(outputs.images) - 1 == 57
    assert (found["clip_score"], found["ref_clip_score"]) == pytest.approx(tuple(np.mean(expected, 0)), abs=1e-9)
    assert found["truncated"] == 0
    assert min(np.mean(expected, 0)) > 0.01


def test_captions_beyond_the_context_of_the_judge_are_counted(outputs, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "words")
    short = Tokenizer(tmp_path / "words", context_length=9)
    found = judged_captions(a_model(tokenizer), short, outputs.pairs, outputs, CPU, **SEEN)
    texts = outputs.written + [text for own in outputs.references for text in own]
    lengths = [len(short.encode(PROMPT + text)) for text in texts]
    long = Tokenizer(tmp_path / "words", context_length=99)
    tokens = [long.encode(PROMPT + text).index(long.eos_id) - 1 for text in texts]  # without BOS
    assert set(lengths) == {10}
    assert 0 < found["truncated"] == sum(count > 6 for count in tokens)


@torch.no_grad()
def test_torchmetrics_gives_the_same_scores_of_the_same_judge(judge, tokenizer, outputs):
    """Its CLIPScore is 100 max(cos, 0) without a prompt; RefCLIPScore is made of its text-text scores."""
    functional = pytest.importorskip("torchmetrics.functional.multimodal.clip_score", reason="pip install torchmetrics")

    class Model(torch.nn.Module):
        config = SimpleNamespace()
        get_image_features = staticmethod(judge.encode_image)

        def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return judge.encode_text(ids)

    def processor(images=None, text=None, **options):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        ids = torch.tensor([tokenizer.encode(one) for one in text])[:, :-1]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def score(source, target: str) -> float:
        return functional.clip_score(source, target, lambda: (Model(), processor)).item() / 100

    clip, ref_clip = [], []
    for i, written, references in zip(outputs.images, outputs.written, outputs.references, strict=True):
        clip.append(2.5 * score(outputs.pairs.load(i, size=32, crop="squash"), PROMPT + written))
        nearest = max(score(PROMPT + written, PROMPT + reference) for reference in references)
        ref_clip.append(2 * clip[-1] * nearest / (clip[-1] + nearest) if clip[-1] + nearest else 0.0)
    found = judged_captions(judge, tokenizer, outputs.pairs, outputs, CPU, **SEEN)
    assert found["clip_score"] == pytest.approx(np.mean(clip), abs=1e-9)
    assert found["ref_clip_score"] == pytest.approx(np.mean(ref_clip), abs=1e-9)
