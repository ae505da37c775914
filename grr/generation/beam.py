"""Beam search."""

import torch
from torch import Tensor

from grr.generation.decoding_state import DecodingState


def beam_search(
    state: DecodingState, *, num_beams: int, length_penalty: float = 1.0, num_captions: int = 1
) -> tuple[Tensor, Tensor]:
    """Returns the captions of highest score for each image, best first: ids [b, n, max_new_tokens], PAD after the end,
    and scores [b, n], for n = num_captions <= num_beams. A caption that does not exist is all PAD, and its score minus
    infinity.

    The score of a caption is its log-probability / its number of tokens ** length_penalty; EOS counts as a token, those
    of a prefix do not, and a caption of max_new_tokens tokens ends without EOS. At each step, the continuations of an
    image's beams by one token are ranked: those among the `num_beams` most likely that end are captions, and the
    `num_beams` most likely that do not end are the next beams. An image is finished when it has `num_beams` captions.
    Therefore num_beams = 1 is greedy search, and with as many beams as there are captions the search is exhaustive.
    """
    tokenizer, device, count, n = state.tokenizer, state.ids.device, len(state.ids), num_captions
    captions = torch.full((count, n, state.max_new_tokens), tokenizer.pad_id, device=device)
    scores = torch.full((count, n), -torch.inf, dtype=state.dtype, device=device)
    images = torch.arange(count, device=device)  # [b], those in `state`
    best, score = captions.clone(), scores.clone()  # of these images, so far
    num_ended = torch.zeros(count, 1, dtype=torch.long, device=device)  # [b, 1], captions of each
    total = torch.zeros(count, 1, dtype=state.dtype, device=device)  # [b, m], log-probabilities of its m beams
    for length in range(state.first + 1, state.max_new_tokens + 1):
        log_p = state.log_probabilities()  # [b m, v]
        b, m, v = *total.shape, log_p.shape[-1]
        total, index = (total.view(-1, 1) + log_p).view(b, m * v).topk(min(2 * num_beams, m * v))  # [b, c], best first
        first = m * torch.arange(b, device=device).unsqueeze(1)  # [b, 1], the first row of each image
        rows, ids = first + index // v, index % v  # [b, c], a beam and its next token
        ends = (ids == tokenizer.eos_id) | (length == state.max_new_tokens)

        ended = total.masked_fill(~ends, -torch.inf)[:, :num_beams] / (length - state.first) ** length_penalty
        unfinished = num_ended < num_beams
        num_ended += ended.isfinite().sum(1, keepdim=True)
        ended, which = ended.masked_fill(~unfinished, -torch.inf).topk(min(n, ended.shape[1]))  # [b, e]
        caption = state.ids.index_select(0, rows.gather(1, which).flatten())[:, 1:].view(*which.shape, -1)  # [b, e, t]
        caption[:, :, length - 1] = ids.gather(1, which)
        score, order = torch.cat((score, ended), 1).sort(dim=1, descending=True, stable=True)  # [b, n + e]
        score, order = score[:, :n], order[:, :n]  # of two equal scores, the first caption
        best = torch.cat((best, caption), 1).gather(1, order.unsqueeze(2).expand(-1, -1, best.shape[2]))  # [b, n, t]

        total, order = total.masked_fill(ends, -torch.inf).topk(min(num_beams, total.shape[1]))  # [b, beams]
        rows, ids = rows.gather(1, order), ids.gather(1, order)
        kept = state.remaining((num_ended >= num_beams).squeeze(1))
        if kept is not None:
            captions[images], scores[images] = best, score
            if len(kept) == 0:
                break
            images, best, score, num_ended = images[kept], best[kept], score[kept], num_ended[kept]
            total, rows, ids = total[kept], rows[kept], ids[kept]
        state.select(rows.flatten(), kept)
        state.extend(ids.flatten())
    captions[images], scores[images] = best, score
    return captions, scores
