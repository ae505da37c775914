"""Beam search."""

import torch
from torch import Tensor

from grr.generation.decoding_state import DecodingState


def beam_search(state: DecodingState, *, num_beams: int, length_penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the caption of highest score for each image: ids [b, max_new_tokens], PAD after the end, and scores [b].

    The score of a caption is its log-probability / its number of tokens ** length_penalty; EOS counts as a token, and a
    caption of max_new_tokens tokens ends without it. At each step, the continuations of an image's beams by one token
    are ranked: those among the `num_beams` most likely that end are captions, and the `num_beams` most likely that do
    not end are the next beams. An image is finished when it has `num_beams` captions. Therefore num_beams = 1 is greedy
    search, and with as many beams as there are captions the search is exhaustive.
    """
    tokenizer, device, count = state.tokenizer, state.ids.device, len(state.ids)
    captions = torch.full((count, state.max_new_tokens), tokenizer.pad_id, device=device)  # best of each image so far
    scores = torch.full((count, 1), -torch.inf, dtype=state.dtype, device=device)
    images = torch.arange(count, device=device)  # [b], the unfinished ones
    num_ended = torch.zeros(count, 1, dtype=torch.long, device=device)  # [b, 1], captions of each
    total = torch.zeros(count, 1, dtype=state.dtype, device=device)  # [b, m], log-probabilities of its m beams
    for length in range(1, state.max_new_tokens + 1):
        log_p = state.log_probabilities()  # [b m, v]
        b, m, v = *total.shape, log_p.shape[-1]
        total, index = (total.view(-1, 1) + log_p).view(b, m * v).topk(min(2 * num_beams, m * v))  # [b, c], best first
        first = m * torch.arange(b, device=device).unsqueeze(1)  # [b, 1], the first row of each image
        rows, ids = first + index // v, index % v  # [b, c], a beam and its next token
        ends = (ids == tokenizer.eos_id) | (length == state.max_new_tokens)

        ended = total.masked_fill(~ends, -torch.inf)[:, :num_beams] / length**length_penalty
        score, best = ended.max(1, keepdim=True)  # [b, 1]
        row, last = rows.gather(1, best).squeeze(1), ids.gather(1, best)  # [b], [b, 1]
        caption = torch.cat((state.ids[row, 1:], last), dim=1)  # [b, length]
        better = (score > scores[images]) & (num_ended < num_beams)
        captions[images, :length] = torch.where(better, caption, captions[images, :length])
        scores[images] = torch.where(better, score, scores[images])

        num_ended += ended.isfinite().sum(1, keepdim=True)
        unfinished = int((num_ended < num_beams).sum())
        if unfinished == 0:
            break
        total, order = total.masked_fill(ends, -torch.inf).topk(min(num_beams, total.shape[1]))  # [b, beams]
        rows, ids = rows.gather(1, order), ids.gather(1, order)
        kept = None
        if 2 * unfinished <= b:
            kept = (num_ended < num_beams).squeeze(1).nonzero().squeeze(1)
            images, num_ended, total, rows, ids = images[kept], num_ended[kept], total[kept], rows[kept], ids[kept]
        state.select(rows.flatten(), kept)
        state.extend(ids.flatten())
    return captions, scores.squeeze(1)
