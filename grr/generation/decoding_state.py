"""Decoding state: the tokens generated so far, their keys and values, and the probabilities of the next token."""

import torch
from torch import Tensor

from grr.models.coca import CoCa
from grr.tokenizers import Tokenizer


class DecodingState:
    """Unfinished captions, one per row and all of one length; the rows of an image are consecutive, equally many each.

    images: uint8 or normalised float [b, 3, h, w] -> b rows that hold only BOS. Every image and every token is computed
    once: keys and values are cached, and the rows of an image share those of the image. The arguments restrict the next
    token as in `generate`, which checks them.
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
        self.min_new_tokens = min_new_tokens
        self.repetition_penalty, self.no_repeat_ngram_size = repetition_penalty, no_repeat_ngram_size
        device = images.device
        self.context = model.image_context(images)  # [b, n, d]
        self.dtype = torch.promote_types(self.context.dtype, torch.float32)  # of log-probabilities
        self.caches = model.caches(self.context.shape[1], max_new_tokens)
        self.ids = torch.full((len(images), 1), tokenizer.bos_id, device=device)  # [rows, 1 + generated tokens]
        self._positions = torch.arange(max_new_tokens, device=device)
        special = torch.tensor([tokenizer.pad_id, tokenizer.bos_id, tokenizer.cls_id], device=device)
        self._forbidden = torch.zeros(tokenizer.vocab_size, dtype=torch.bool, device=device).index_fill(
            0, special, True
        )

    def log_probabilities(self) -> Tensor:
        """Compute the log-probability of every next token of every row: [rows, v], float32 or wider.

        Minus infinity for tokens that are not allowed. Call it once per token, because it appends the last token of
        each row to the caches. Raises ValueError if the model computes NaN.
        """
        count = self.ids.shape[1] - 1
        position = self._positions[count : count + 1]
        logits = self.model.next_token_logits(self.ids[:, -1:], self.context, positions=position, caches=self.caches)
        log_p = logits.masked_fill(self._forbidden, -torch.inf).log_softmax(-1, dtype=self.dtype)  # [rows, v]
        if log_p.isnan().any():
            raise ValueError(
                "generate: the scores of the next token must be numbers, got NaN; compute in float32, or use a model "
                "whose weights are finite"
            )
        generated, n = self.ids[:, 1:], self.no_repeat_ngram_size  # [rows, count]
        if self.repetition_penalty != 1:
            log_p.scatter_(1, generated, log_p.gather(1, generated) * self.repetition_penalty)
        if 0 < n <= count:
            ngrams = generated.unfold(1, n, 1)  # [rows, count - n + 1, n]
            repeats = (ngrams[..., :-1] == generated[:, None, count - n + 1 :]).all(-1)  # if its last token followed
            log_p.scatter_(1, ngrams[..., -1].masked_fill(~repeats, self.tokenizer.pad_id), -torch.inf)
        if count < self.min_new_tokens:
            log_p[:, self.tokenizer.eos_id] = -torch.inf
        return log_p

    def extend(self, ids: Tensor) -> None:
        """Append one token to each row: [rows]."""
        self.ids = torch.cat((self.ids, ids.unsqueeze(1)), dim=1)

    def select(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Keep these rows, in this order; a row may occur more than once. With images, keep only those images."""
        self.ids = self.ids[rows]
        for cache in (*self.caches[0], *self.caches[1]):
            cache.tokens.select(rows)
            if images is not None:
                cache.context.select(images)
        if images is not None:
            self.context = self.context[images]
