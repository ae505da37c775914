"""Captions being written: what the model has read of them, and how likely each next token is."""

import torch
from torch import Tensor

from grr.models.coca import CoCa
from grr.tokenizers.sentencepiece import Tokenizer


class DecodingState:
    """Captions being written, one a row and all of one length, the same number for each image and side by side.

    images: uint8 or normalised float [b, 3, h, w] -> b drafts that hold nothing but BOS. An image is read once, and
    every token as well: keys and values are kept, and those of an image are shared by all its drafts. What may follow
    is said by the arguments, as in `generate`, which checks them.
    """

    def __init__(
        self,
        model: CoCa,
        images: Tensor,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.min_new_tokens, self.repetition_penalty, self.no_repeat_ngram_size = (
            min_new_tokens,
            repetition_penalty,
            no_repeat_ngram_size,
        )
        device = images.device
        self.context = model.image_context(images)  # [b, n, d]
        self.dtype = torch.promote_types(self.context.dtype, torch.float32)  # of log-probabilities
        self.caches = model.caches(self.context.shape[1], max_new_tokens)
        self.ids = torch.full((len(images), 1), tokenizer.bos_id, device=device)  # [rows, 1 + tokens written]
        self._places = torch.arange(max_new_tokens, device=device)
        never = torch.tensor([tokenizer.pad_id, tokenizer.bos_id, tokenizer.cls_id], device=device)
        self._never = torch.zeros(tokenizer.vocab_size, dtype=torch.bool, device=device).index_fill(0, never, True)

    def log_probabilities(self) -> Tensor:
        """Read the last token of every draft; gives how likely each next one is: [rows, v], float32 or wider.

        Minus infinity for what may not be written. Once for every token: what was read stands in the caches.
        Raises ValueError if the model computes NaN.
        """
        count = self.ids.shape[1] - 1
        here = self._places[count : count + 1]
        logits = self.model.next_token_logits(self.ids[:, -1:], self.context, positions=here, caches=self.caches)
        log_p = logits.masked_fill(self._never, -torch.inf).log_softmax(-1, dtype=self.dtype)  # [rows, v]
        if log_p.isnan().any():
            raise ValueError(
                "generate: the scores of the next token must be numbers, got NaN; compute in float32, or "
                "take a model whose weights are finite"
            )
        written, n = self.ids[:, 1:], self.no_repeat_ngram_size  # [rows, count]
        if self.repetition_penalty != 1:
            log_p.scatter_(1, written, log_p.gather(1, written) * self.repetition_penalty)
        if 0 < n <= count:
            ngrams = written.unfold(1, n, 1)  # [rows, count - n + 1, n]
            again = (ngrams[..., :-1] == written[:, None, count - n + 1 :]).all(-1)  # its last token would be a repeat
            log_p.scatter_(1, ngrams[..., -1].masked_fill(~again, self.tokenizer.pad_id), -torch.inf)
        if count < self.min_new_tokens:
            log_p[:, self.tokenizer.eos_id] = -torch.inf
        return log_p

    def extend(self, ids: Tensor) -> None:
        """Write one more token on each draft: [rows]."""
        self.ids = torch.cat((self.ids, ids.unsqueeze(1)), dim=1)

    def select(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Go on with these rows, in this order; a row may be taken more than once. With images, with these alone."""
        self.ids = self.ids[rows]
        for cache in (*self.caches[0], *self.caches[1]):
            cache.tokens.select(rows)
            if images is not None:
                cache.context.select(images)
        if images is not None:
            self.context = self.context[images]
