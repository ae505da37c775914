"""Generation of captions by greedy search, beam search or sampling."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from grr.config.signature import arguments_of
from grr.config.spelling import check_arguments
from grr.generation.beam import beam_search
from grr.generation.cpu_linear import onednn_linears
from grr.generation.decoding_state import DecodingState
from grr.models.coca import CoCa, evaluating
from grr.tokenizers import Tokenizer


@torch.no_grad()
def generate(
    model: CoCa,
    images: Tensor,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
) -> list[str]:
    """Generate a caption for each image by greedy search, beam search (num_beams > 1) or sampling (temperature > 0).

    images: uint8 or normalised float [b, 3, h, w] -> b captions of min_new_tokens to max_new_tokens tokens (None: as
    many as fit, tokenizer.context_length - 3). PAD, BOS and CLS are never generated.

    Beam search maximises log-probability / number of tokens ** length_penalty: 0 compares total log-probabilities,
    which favours short captions, 1 the mean per token. Sampling draws from softmax(logits / temperature), restricted to
    the top_k most likely tokens, then to the fewest of these whose probabilities sum to top_p (nucleus sampling,
    Holtzman et al. 2020). Equal seeds lead to equal captions for the same batch on the same device.

    repetition_penalty multiplies the log-probability of every token that the caption contains (after Keskar et al.
    2019, CTRL); no_repeat_ngram_size = n forbids a token that would repeat a sequence of n tokens of the caption.
    Raises ValueError for arguments out of range, for arguments that contradict each other, and for a tokenizer with
    another vocabulary than the model.
    """
    longest = tokenizer.context_length - 3  # BOS, EOS and CLS are in every row
    max_new_tokens = longest if max_new_tokens is None else max_new_tokens
    _check(
        images,
        model.multimodal_decoder.head.out_features,
        tokenizer,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        num_beams=num_beams,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
    )
    with evaluating(model), onednn_linears(model.text_decoder, model.multimodal_decoder):
        state = DecodingState(
            model,
            images,
            tokenizer,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
        )
        captions = search(
            state,
            num_beams=num_beams,
            length_penalty=length_penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
    return [tokenizer.decode(row) for row in captions.tolist()]


def check_generation(who: str, options: Iterable[str]) -> None:
    """Raise TypeError, with the nearest name, if one of the options is not an option of `generate`."""
    check_arguments(f"{who}: generate", options, arguments_of(generate)[0], reference="help(grr.generate)")


def search(
    state: DecodingState,
    *,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Generate the captions of a state: ids [b, max_new_tokens], PAD after EOS. Arguments are those of `generate`."""
    if num_beams > 1:
        return beam_search(state, num_beams=num_beams, length_penalty=length_penalty)[0]
    if temperature == 0:
        return _until_all_end(state, lambda log_p: log_p.argmax(-1))
    generator = torch.Generator(state.ids.device).manual_seed(seed)
    return _until_all_end(state, lambda log_p: sample(log_p, generator, temperature, top_k, top_p))


def sample(
    log_p: Tensor, generator: torch.Generator, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Draw one token per row: log-probabilities up to a constant [b, v] -> [b]."""
    if top_k is None and top_p is None:
        return _draw((log_p / temperature).softmax(-1), generator)
    v = log_p.shape[-1]
    log_p, ids = log_p.topk(min(top_k or v, v))  # [b, k], the most likely first
    p = (log_p / temperature).softmax(-1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keep the token that reaches top_p
    return ids.gather(1, _draw(p, generator).unsqueeze(1)).squeeze(1)


def _until_all_end(state: DecodingState, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Append the token that `choose` returns until all rows end: ids [b, max_new_tokens], PAD after EOS.

    choose: log-probabilities [b, v] -> ids [b].
    """
    tokenizer, device, count = state.tokenizer, state.ids.device, len(state.ids)
    captions = torch.full((count, state.max_new_tokens), tokenizer.pad_id, device=device)
    images = torch.arange(count, device=device)  # [b], those in `state`
    ended = torch.zeros(count, dtype=torch.bool, device=device)  # [b]
    for _ in range(state.max_new_tokens):
        ids = choose(state.log_probabilities()).masked_fill(ended, tokenizer.pad_id)  # [b]
        state.extend(ids)
        ended |= ids == tokenizer.eos_id
        kept = state.remaining(ended)
        if kept is not None:
            captions[images] = state.ids[:, 1:]
            if len(kept) == 0:
                break
            images, ended = images[kept], ended[kept]
            state.select(kept, kept)
    captions[images] = state.ids[:, 1:]
    return captions


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index per row of weights [b, k] -> [b], the same as torch.multinomial, which waits for the device."""
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def _check(
    images: Tensor,
    vocab_size: int,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    num_beams: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    no_repeat_ngram_size: int,
) -> None:
    """Raise ValueError with every rule that is broken."""
    longest, words = tokenizer.context_length - 3, tokenizer.vocab_size - 4  # words: all ids but PAD, EOS, BOS and CLS
    rules = [
        (
            images.ndim == 4 and len(images) > 0,
            f"images must be [b, 3, h, w] with b >= 1, got {list(images.shape)}; for a single image, pass "
            "image.unsqueeze(0)",
        ),
        (
            vocab_size == tokenizer.vocab_size,
            f"the model has {vocab_size} ids and the tokenizer {tokenizer.vocab_size}; use the tokenizer that the "
            "model was trained with",
        ),
        (
            1 <= max_new_tokens <= longest,
            f"max_new_tokens must be from 1 to {longest}, what fits into context_length={tokenizer.context_length}, "
            f"got {max_new_tokens=}",
        ),
        (
            0 <= min_new_tokens <= max_new_tokens,
            f"min_new_tokens must be from 0 to max_new_tokens, got {min_new_tokens=}, {max_new_tokens=}",
        ),
        (num_beams >= 1, f"num_beams must be at least 1, got {num_beams=}; 1 turns beam search off"),
        (0 <= temperature < math.inf, f"temperature must be at least 0, got {temperature=}; 0 turns sampling off"),
        (
            num_beams <= 1 or temperature == 0,
            f"beam search does not sample, got {num_beams=}, {temperature=}; leave one of them out",
        ),
        (
            temperature != 0 or (top_k is None and top_p is None),
            f"top_k and top_p are for sampling, got {top_k=}, {top_p=}, {temperature=}; set temperature to 1.0",
        ),
        (top_k is None or top_k >= 1, f"top_k must be at least 1, got {top_k=}; leave it out to draw from all tokens"),
        (
            top_p is None or 0 < top_p <= 1,
            f"top_p must be above 0 and at most 1, got {top_p=}; leave it out to draw from all tokens",
        ),
        (
            0 < repetition_penalty < math.inf,
            f"repetition_penalty must be positive, and above 1 to discourage repetition, got {repetition_penalty=}",
        ),
        (
            no_repeat_ngram_size >= 0,
            f"no_repeat_ngram_size must be at least 0, got {no_repeat_ngram_size=}; 0 allows repetition",
        ),
        (
            no_repeat_ngram_size == 0 or min_new_tokens <= words,
            f"min_new_tokens must be at most {words}, the words of the vocabulary, if none may be repeated, got "
            f"{min_new_tokens=}, {no_repeat_ngram_size=}",
        ),
    ]
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ValueError("generate: " + "; ".join(broken))
