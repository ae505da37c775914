"""Captions written with caches are those of the plain computation, token for token."""

import pytest
import torch

from grr.builders import grr_coca_tiny
from grr.generate import generate
from grr.tokenizer import Tokenizer, train_tokenizer

WORDS = ["a", "the", "red", "blue", "big", "small", "fox", "bread", "owl", "boat", "hill", "runs", "sits", "on", "near"]


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    captions = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    return train_tokenizer(captions, tmp_path_factory.mktemp("t") / "t.model", vocab_size=100, context=16)


def plainly(model, image: torch.Tensor, tok: Tokenizer, max_tokens: int) -> str:
    """One image, the whole prefix computed anew for each token."""
    ids = [tok.bos_id]
    with torch.no_grad():
        for _ in range(max_tokens):
            logits = model(image.unsqueeze(0), torch.tensor([ids])).logits[0, -1]
            logits[[tok.pad_id, tok.bos_id, tok.cls_id]] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == tok.eos_id:
                break
    return tok.decode(ids)


@pytest.mark.parametrize("position", ["rope", "sinusoidal", "learned"])
def test_cached_batched_captions_are_those_of_the_plain_computation(tok, position):
    captions = set()
    for seed in range(4):
        torch.manual_seed(seed)
        model = grr_coca_tiny(vocab_size=tok.vocab_size, context=16, text_position=position, dropout=0.5).double()
        with torch.no_grad():
            model.multimodal_decoder.head.weight *= 8  # decided opinions, captions of different lengths
        model.eval()
        images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
        written = generate(model.train(), images, tok)
        assert model.training  # as it was before
        model.eval()
        assert written == [plainly(model, image, tok, 13) for image in images]
        captions |= set(written)
    assert len(captions) >= 4  # it was not one caption all along


def test_no_more_tokens_are_written_than_asked_for(tok):
    torch.manual_seed(0)
    model = grr_coca_tiny(vocab_size=tok.vocab_size, context=16)
    images = torch.rand(2, 3, 32, 32)
    for count in (1, 2, 5):
        expected = [plainly(model.eval(), image, tok, count) for image in images]
        assert generate(model, images, tok, max_tokens=count) == expected
