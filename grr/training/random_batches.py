"""Batches of random images and captions, for benchmarks: no files, no tokenizer to train."""

from dataclasses import dataclass

import torch

from grr.data import Batch
from grr.data.collate import collate_captions
from grr.tokenizers.sentencepiece import EOS, PAD, UNK


@dataclass
class NumberTokenizer:
    """A tokenizer of any vocabulary size that needs no file: a word is an id, in digits."""

    vocab_size: int
    context_length: int
    pad_id, eos_id = PAD, EOS

    def __post_init__(self) -> None:
        self.bos_id, self.cls_id = self.vocab_size - 2, self.vocab_size - 1

    def encode(self, tokens: list[int]) -> list[int]:
        """Lay out a caption as grr.tokenizers.sentencepiece does: context_length + 1 ids."""
        padding = [PAD] * (self.context_length - 3 - len(tokens))
        return [self.bos_id, *tokens, EOS, *padding, self.cls_id, PAD]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def random_batches(
    count: int,
    *,
    batch_size: int,
    vocab_size: int,
    context_length: int,
    image_size: int,
    caption_tokens: int | None = None,
    text_multiple: int = 1,
    seed: int = 0,
) -> list[Batch]:
    """Returns `count` batches of noise with random captions.

    caption_tokens: the mean of their Poisson lengths; None: every caption is as long as the context allows. A batch is
    as long as its longest caption, so captions of 15 tokens on average do not make batches of 15 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer, room = NumberTokenizer(vocab_size, context_length), context_length - 3
    mean = torch.full((batch_size,), float(room if caption_tokens is None else caption_tokens))
    batches = []
    for _ in range(count):
        lengths = mean if caption_tokens is None else torch.poisson(mean, generator).clamp(1, room)  # [b]
        words = torch.randint(UNK + 1, tokenizer.bos_id, (batch_size, room), generator=generator)
        rows = [tokenizer.encode(row[: int(n)].tolist()) for row, n in zip(words, lengths, strict=True)]
        images = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
        batches.append(
            Batch(images, *collate_captions(rows, text_multiple=text_multiple), names=[""] * batch_size, replaced=0)
        )
    return batches
