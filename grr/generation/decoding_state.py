"""Decoding state: the tokens generated so far, their keys and values, and the probabilities of the next token."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grr.components import Block, KeyValueCache, SelfAttention
from grr.generation.cache_memory import CacheMemory
from grr.models.coca import CoCa
from grr.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

CHECK_EVERY = 8  # tokens from one reading of the device to the next, where its memory is not that of the host


class DecodingState:
    """Captions of equal length, one per row; the rows of an image are consecutive, equally many each.

    images: uint8 or normalised float [b, 3, h, w] -> b rows that hold BOS and the tokens of the prefix, which are the
    first of a caption's max_new_tokens. Every image and every token is computed once: keys and values are cached, and
    the rows of an image share those of the image. The arguments restrict the next token as in `generate`, which checks
    them.

    On a CPU, attention reads the filled part of the caches, and finished images can be dropped after every token. On
    another device that costs more than it saves, because the host would have to wait for the device: with
    `fixed_shapes` (by default off the CPU), the host reads the device every CHECK_EVERY tokens, all tensors of a step
    keep their shapes and addresses from the second token on, and finished images stay until all are finished. On a
    CUDA device, such a step is captured in a CUDA graph, unless the model is sharded or quantised.
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
        prefix: Sequence[int] = (),
        fixed_shapes: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.min_new_tokens = min_new_tokens
        self.repetition_penalty, self.no_repeat_ngram_size = repetition_penalty, no_repeat_ngram_size
        device = images.device
        if fixed_shapes is None:
            fixed_shapes = device.type != "cpu" and _attends_under_masks(model)
        self.fixed_shapes = fixed_shapes
        self.context = model.image_context(images)  # [b, n, d]
        self.dtype = torch.promote_types(self.context.dtype, torch.float32)  # of log-probabilities
        room = 8 * -(-max_new_tokens // 8) if fixed_shapes else max_new_tokens  # kernels need masks aligned to 16 bytes
        self.caches = model.caches(self.context.shape[1], room)
        self.first = self.length = len(prefix)  # number of tokens whose successors were computed, BOS included
        self.ids = torch.full((len(images), 1 + max_new_tokens), tokenizer.pad_id, device=device)  # [rows, 1 + t]
        self.ids[:, 0] = tokenizer.bos_id
        for column, token in enumerate(prefix, 1):
            self.ids[:, column] = token
        self._place = torch.full((1,), self.first, device=device)  # of the last token in ids
        self._read = torch.arange(self.first + 1, device=device)  # places of the tokens that the next step reads
        self._index = torch.arange(max_new_tokens, device=device)
        self._found_nan = torch.zeros((), dtype=torch.bool, device=device)
        every = torch.arange(tokenizer.vocab_size, device=device)
        self._forbidden = (every == tokenizer.pad_id) | (every == tokenizer.bos_id) | (every == tokenizer.cls_id)  # [v]
        self._mask: Tensor | None = None
        self._memory: CacheMemory | None = None
        self._replay: Callable[[], Tensor] | None = None

    def log_probabilities(self) -> Tensor:
        """Compute the log-probability of every next token of every row: [rows, v], float32 or wider.

        Minus infinity for tokens that are not allowed. Call it once per token, because it appends the last token of
        each row to the caches. The tensor is valid until the next call.
        """
        if self.length == self.first + 1 and self.fixed_shapes:
            self._fix_shapes()
        elif self.length == self.first + 2 and self.fixed_shapes and _can_be_captured(self.model, self.ids.device):
            self._replay = self._captured()
        self.length += 1
        log_p = self.compute() if self._replay is None else self._replay()
        self._read = self._place
        return log_p

    def compute(self) -> Tensor:
        """Compute `log_probabilities` without a decision of the host: one program for all tokens but the first."""
        if self._mask is not None:
            self._mask.index_fill_(-1, self._place, 0.0)
        last = self.ids.index_select(1, self._read)  # [rows, 1], of the first step [rows, 1 + prefix]
        logits = self.model.next_token_logits(last, self.context, positions=self._read, caches=self.caches)
        log_p = logits.masked_fill(self._forbidden, -torch.inf).log_softmax(-1, dtype=self.dtype)  # [rows, v]
        self._found_nan.logical_or_(log_p[:, 0].isnan().any())  # one NaN among its logits makes a whole row NaN
        written, n = self.ids[:, 1:], self.no_repeat_ngram_size  # [rows, t], PAD after the tokens generated so far
        if self.repetition_penalty != 1:
            log_p.scatter_(1, written, log_p.gather(1, written) * self.repetition_penalty)
        if 0 < n < self.max_new_tokens:
            ngrams = written.unfold(1, n, 1)  # [rows, t - n + 1, n]
            whole = self._index[: ngrams.shape[1]] <= self._place - n  # [t - n + 1], those without PAD
            ending = (self._index[: n - 1] + self._place + 1 - n).clamp(min=0)
            repeats = whole & (ngrams[..., :-1] == written.index_select(1, ending).unsqueeze(1)).all(-1)
            log_p.scatter_(1, ngrams[..., -1].masked_fill(~repeats, self.tokenizer.pad_id), -torch.inf)
        if self.min_new_tokens:
            log_p[:, self.tokenizer.eos_id].masked_fill_(self._place < self.min_new_tokens, -torch.inf)
        return log_p

    def extend(self, ids: Tensor) -> None:
        """Append one token to each row: [rows]."""
        self.ids[:, self.length] = ids
        self._place += 1

    def select(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Keep these rows, in this order; a row may occur more than once. With images, keep only those images."""
        ids = self.ids.index_select(0, rows)
        self.ids = self.ids.copy_(ids) if len(rows) == len(self.ids) else ids
        if self._memory is None:
            self._memory = CacheMemory(self._token_caches())
        self._memory.select(rows)
        if images is not None:
            for cache in (*self.caches[0], *self.caches[1]):
                cache.context.select(images)
            self.context = self.context[images]

    def remaining(self, finished: Tensor) -> Tensor | None:
        """Returns the images that are not finished, once it is worth the while to keep only them, and else None.

        finished: [b] -> [n], empty when all are finished. To be called once per token. With fixed shapes, the result is
        None or empty, and mostly None without a wait for the device. Raises ValueError if the model computed NaN.
        """
        if self.fixed_shapes and self.length % CHECK_EVERY and self.length < self.max_new_tokens:
            return None
        found_nan, num_finished = torch.stack((self._found_nan, finished.sum())).tolist()
        if found_nan:
            raise ValueError(
                "generate: the scores of the next token must be numbers, got NaN; compute in float32, or use a model "
                "whose weights are finite"
            )
        unfinished = len(finished) - num_finished
        if unfinished == 0 or (2 * unfinished <= len(finished) and not self.fixed_shapes):
            return (~finished).nonzero().squeeze(1)
        return None

    def _fix_shapes(self) -> None:
        """Fix the shapes of the caches, which have the rows and the dtype of all further steps."""
        caches = self._token_caches()
        self._mask = caches[0].keys.new_full((1, 1, 1, caches[0].max_length), -torch.inf)
        self._mask[..., : caches[0].length].zero_()
        for cache in caches:
            cache.fix(self._place, self._mask)

    def _captured(self) -> Callable[[], Tensor] | None:
        """Returns the captured step; None, with a warning, if a kernel of the model cannot be captured."""
        try:
            return captured(self.compute)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning("generate: a step cannot be captured in a CUDA graph (%s); it runs kernel by kernel", reason)
            return None

    def _token_caches(self) -> list[KeyValueCache]:
        """Returns the caches of the blocks that have self-attention."""
        return [cache.tokens for cache in (*self.caches[0], *self.caches[1]) if cache.tokens.length]


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record the kernels of a step in a CUDA graph: a function that runs them, and overwrites its previous result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may call CUDA meanwhile
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _can_be_captured(model: CoCa, device: torch.device) -> bool:
    """Returns whether a decoding step consists of kernels alone: the model is neither sharded nor quantised."""
    return (
        device.type == "cuda"
        and not any(hasattr(module, "unshard") for module in model.modules())  # FSDPModule takes seconds to import
        and all(type(parameter.data) is Tensor for parameter in model.parameters())
    )


def _attends_under_masks(model: CoCa) -> bool:
    """Returns whether all self-attention is that of this library, which reads the mask of a cache of fixed shapes."""
    decoders = (model.text_decoder, model.multimodal_decoder)
    blocks = [module for decoder in decoders for module in decoder.modules() if isinstance(module, Block)]
    attentions = [block.attention for block in blocks if block.attention is not None]
    return bool(attentions) and all(type(attention).forward is SelfAttention.forward for attention in attentions)
