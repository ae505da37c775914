"""Generation of captions by greedy search, beam search or sampling."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from grr.components.dropout import fold_in
from grr.config.signature import arguments_of
from grr.config.spelling import check_arguments
from grr.generation.beam import beam_search
from grr.generation.cpu_linear import onednn_linears
from grr.generation.decoding_state import DecodingState
from grr.models.coca import CoCa, evaluating
from grr.seeds import derive_seed
from grr.tokenizers import Tokenizer

OF_STATE = ("max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size")  # options
OF_SEARCH = ("num_beams", "length_penalty", "temperature", "top_k", "top_p", "seed")


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
    prefix: str = "",
    seed: int = 0,
) -> list[str]:
    """Generate a caption for each image by greedy search, beam search (num_beams > 1) or sampling (temperature > 0).

    images: uint8 or normalised float [b, 3, h, w] -> b captions of min_new_tokens to max_new_tokens tokens (None: as
    many as fit, tokenizer.context_length - 3). PAD, BOS and CLS are never generated.

    Beam search maximises log-probability / number of tokens ** length_penalty: 0 compares total log-probabilities,
    which favours short captions, 1 the mean per token. Sampling draws from softmax(logits / temperature), restricted to
    the top_k most likely tokens, then to the fewest of these whose probabilities sum to top_p (nucleus sampling,
    Holtzman et al. 2020). What is drawn for image i depends on the seed and i alone, not on the other images.

    repetition_penalty multiplies the log-probability of every token that the caption contains (after Keskar et al.
    2019, CTRL); no_repeat_ngram_size = n forbids a token that would repeat a sequence of n tokens of the caption. Every
    caption begins with the prefix, whose tokens count among those of the caption.
    Raises ValueError for arguments out of range, for arguments that contradict each other, and for a tokenizer with
    another vocabulary than the model.
    """
    options = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "prefix": prefix,
        "seed": seed,
    }
    return [captions[0] for captions in generate_several(model, images, tokenizer, options)[0]]


@torch.no_grad()
def generate_several(
    model: CoCa,
    images: Tensor,
    tokenizer: Tokenizer,
    options: dict[str, Any],
    *,
    num_captions: int = 1,
    keys: Tensor | None = None,
) -> tuple[list[list[str]], Tensor]:
    """Generate num_captions captions for each image: b lists, and the `image_context` of the images, [b, n, d].

    options: those of `generate`; what is left out has its default. Sampling draws the captions of an image
    independently, beam search returns the best, best first: fewer where fewer exist.
    keys: int64 [b], which decide what is drawn for each image in any batch; by default hashes of the seed and the row.
    Raises ValueError as `generate` does, and if greedy search, or fewer beams, should find several captions.
    """
    options, prefix = check_options(model, tokenizer, options, num_captions=num_captions, images=images)
    with evaluating(model), onednn_linears(model.text_decoder, model.multimodal_decoder):
        state = DecodingState(model, images, tokenizer, prefix=prefix, **{name: options[name] for name in OF_STATE})
        context = state.context
        found = search(state, num_captions=num_captions, keys=keys, **{name: options[name] for name in OF_SEARCH})
    captions = [[tokenizer.decode(row) for row in rows if row[0] != tokenizer.pad_id] for rows in found.tolist()]
    return captions, context


def check_options(
    model: CoCa, tokenizer: Tokenizer, options: dict[str, Any], *, num_captions: int = 1, images: Tensor | None = None
) -> tuple[dict[str, Any], list[int]]:
    """Returns the options of `generate_several` with their defaults, and the tokens of the prefix.

    images: are checked too. Raises ValueError as `generate_several` does.
    """
    options = {name: argument.default for name, argument in arguments_of(generate)[0].items()} | options
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = tokenizer.context_length - 3  # BOS, EOS and CLS are in every row
    prefix = prefix_ids(tokenizer, options.pop("prefix"))
    rules = {name: value for name, value in options.items() if name not in ("length_penalty", "seed")}
    vocab_size = model.multimodal_decoder.head.out_features
    _check(images, vocab_size, tokenizer, num_captions=num_captions, prefix=len(prefix), **rules)
    return options, prefix


def prefix_ids(tokenizer: Tokenizer, prefix: str) -> list[int]:
    """Returns the tokens of the beginning of a caption."""
    ids = tokenizer.encode(prefix)
    return ids[1 : ids.index(tokenizer.eos_id)]


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
    num_captions: int = 1,
    keys: Tensor | None = None,
) -> Tensor:
    """Generate the captions of a state: ids [b, n, max_new_tokens], PAD after EOS, for n = num_captions.

    Arguments are those of `generate` and `generate_several`. A caption that beam search did not find is all PAD.
    """
    if num_beams > 1:
        return beam_search(state, num_beams=num_beams, length_penalty=length_penalty, num_captions=num_captions)[0]
    if temperature == 0:
        return _until_all_end(state, lambda log_p, keys, step: log_p.argmax(-1))
    device = state.ids.device
    if keys is None:
        keys = fold_in(derive_seed(seed), torch.arange(len(state.ids), device=device))  # [b]
    draws = fold_in(keys.unsqueeze(1), torch.arange(num_captions, device=device))  # [b, n]

    def draw(log_p: Tensor, keys: Tensor, step: int) -> Tensor:
        of_step = fold_in(keys, torch.full((1,), step, device=device))  # [b n]
        return sample(log_p, of_step, temperature, top_k, top_p)

    return _until_all_end(state, draw, draws)


def sample(log_p: Tensor, keys: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Draw one token per row: log-probabilities up to a constant [b, v] -> [b]. keys: int64 [b], which decide it."""
    if top_k is None and top_p is None:
        return _draw((log_p / temperature).softmax(-1), keys)
    v = log_p.shape[-1]
    log_p, ids = log_p.topk(min(top_k or v, v))  # [b, k], the most likely first
    p = (log_p / temperature).softmax(-1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keep the token that reaches top_p
    return ids.gather(1, _draw(p, keys).unsqueeze(1)).squeeze(1)


def _until_all_end(
    state: DecodingState, choose: Callable[[Tensor, Tensor, int], Tensor], keys: Tensor | None = None
) -> Tensor:
    """Append the token that `choose` returns until all rows end: ids [b, n, max_new_tokens], PAD after EOS.

    keys: int64 [b, n], one for each caption; None: n is 1, and nothing is drawn. choose: log-probabilities [b n, v],
    keys [b n] and the number of the step -> ids [b n].
    """
    tokenizer, device, count = state.tokenizer, state.ids.device, len(state.ids)
    keys = torch.zeros(count, 1, dtype=torch.long, device=device) if keys is None else keys
    n = keys.shape[1]
    captions = torch.full((count, n, state.max_new_tokens), tokenizer.pad_id, device=device)
    images = torch.arange(count, device=device)  # [b], those in `state`
    ended = torch.zeros(count, n, dtype=torch.bool, device=device)  # [b, n]
    for step in range(state.first, state.max_new_tokens):
        log_p = state.log_probabilities()  # [b n, v], of the first step [b, v]
        if n > 1 and step == state.first:
            rows = torch.arange(count, device=device).repeat_interleave(n, output_size=count * n)
            log_p = log_p.index_select(0, rows)  # [b n, v]
            state.select(rows)
        ids = choose(log_p, keys.flatten(), step).view(-1, n).masked_fill(ended, tokenizer.pad_id)  # [b, n]
        state.extend(ids.flatten())
        ended |= ids == tokenizer.eos_id
        kept = state.remaining(ended.all(1))
        if kept is not None:
            captions[images] = state.ids[:, 1:].view(len(images), n, -1)
            if len(kept) == 0:
                break
            images, ended, keys = images[kept], ended[kept], keys[kept]
            state.select((n * kept.unsqueeze(1) + torch.arange(n, device=device)).flatten(), kept)
    captions[images] = state.ids[:, 1:].view(len(images), n, -1)
    return captions


def _draw(p: Tensor, keys: Tensor) -> Tensor:
    """Draw an index per row of weights [b, k] -> [b] by the first of k exponential clocks that rings, without a wait.

    keys: int64 [b]; a row's draw depends on its key and its weights alone.
    """
    bits = fold_in(keys.unsqueeze(1), torch.arange(p.shape[-1], device=p.device)) >> 8 & 2**56 - 1  # [b, k]
    uniform = ((bits.float() + 0.5) * 2.0**-56).clamp(max=1 - 2.0**-24)  # in (0, 1)
    return (p / -torch.log1p(-uniform)).argmax(-1)


def _check(
    images: Tensor | None,
    vocab_size: int,
    tokenizer: Tokenizer,
    *,
    num_captions: int,
    prefix: int,
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
            images is None or (images.ndim == 4 and len(images) > 0),
            f"images must be [b, 3, h, w] with b >= 1, got {list(getattr(images, 'shape', ()))}; for a single image, "
            "pass image.unsqueeze(0)",
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
        (
            prefix < max_new_tokens,
            f"prefix must have fewer tokens than max_new_tokens, got {prefix} tokens, {max_new_tokens=}; shorten it",
        ),
        (
            num_captions == 1 or 1 <= num_captions <= num_beams or (num_captions >= 1 and temperature != 0),
            "several captions of an image need sampling or as many beams, and at least one is needed, got "
            f"{num_captions=}, {num_beams=}, {temperature=}; set temperature to 1.0, or raise num_beams",
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
