"""Captions of numbers for small models of open_clip: rows of ids, a tokenizer without a file, and images."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from grr.tokenizers import Tokenizer

PAD, BOS, EOS, CLS, ROOM = 0, 48, 49, 50, 8
captions = st.lists(st.lists(st.integers(1, 47), max_size=ROOM), min_size=1, max_size=4)


def layout(tokens: list[int]) -> list[int]:
    """This library's row: BOS t1 ... tn EOS PAD ... PAD CLS PAD; without the last two it is open_clip's."""
    return [BOS, *tokens, EOS, *[PAD] * (ROOM - len(tokens)), CLS, PAD]


def rows(captions: list[list[int]]) -> Tensor:
    return torch.tensor([layout(caption) for caption in captions])


def some_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


class Spelled(Tokenizer):
    """Decodes to the ids themselves; a vocabulary of numbers needs no file."""

    pad_id, eos_id, bos_id, cls_id, vocab_size, context_length = PAD, EOS, BOS, CLS, 51, 11

    def __init__(self) -> None:
        pass

    def decode(self, ids) -> list[int]:
        return ids[: ids.index(EOS)] if EOS in ids else ids

    def _tokens(self, caption: str) -> list[int]:
        return [int(word) for word in caption.split()]
