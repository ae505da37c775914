"""Beam search: of each caption, several beginnings are followed at once, the most likely ones."""

import torch
from torch import Tensor

from grr.generation.decoding_state import DecodingState


def beam_search(drafts: DecodingState, *, num_beams: int, length_penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the caption of highest score for each image: ids [b, max_new_tokens], PAD after the end, and scores [b].

    The score of a caption is its log-probability / its number of tokens ** length_penalty; EOS is one of them, and a
    caption of max_new_tokens tokens needs none. At each step, all continuations of an image's beams by one token
    compete: those among the `num_beams` most likely that end are captions, and the `num_beams` most likely that do not
    end are the next beams. An image is finished when it has `num_beams` captions. So num_beams = 1 is greedy search,
    and as many beams as there are captions find the best of all.
    """
    tokenizer, device, count = drafts.tokenizer, drafts.ids.device, len(drafts.ids)
    captions = torch.full((count, drafts.max_new_tokens), tokenizer.pad_id, device=device)  # the best of each image
    scores = torch.full((count, 1), -torch.inf, dtype=drafts.dtype, device=device)
    images = torch.arange(count, device=device)  # [b], those that drafts are kept of
    found = torch.zeros(count, 1, dtype=torch.long, device=device)  # [b, 1], number of their captions
    total = torch.zeros(count, 1, dtype=drafts.dtype, device=device)  # [b, m], log-probabilities of their m drafts
    for length in range(1, drafts.max_new_tokens + 1):
        log_p = drafts.log_probabilities()  # [b m, v]
        b, m, v = *total.shape, log_p.shape[-1]
        total, place = (total.view(-1, 1) + log_p).view(b, m * v).topk(min(2 * num_beams, m * v))  # [b, c], best first
        first = m * torch.arange(b, device=device).unsqueeze(1)  # [b, 1], where the drafts of an image begin
        rows, ids = first + place // v, place % v  # [b, c], a draft and its next token
        ends = (ids == tokenizer.eos_id) | (length == drafts.max_new_tokens)

        ended = total.masked_fill(~ends, -torch.inf)[:, :num_beams] / length**length_penalty
        score, best = ended.max(1, keepdim=True)  # [b, 1]
        row, last = rows.gather(1, best).squeeze(1), ids.gather(1, best)  # [b], [b, 1]
        caption = torch.cat((drafts.ids[row, 1:], last), dim=1)  # [b, length]
        better = (score > scores[images]) & (found < num_beams)
        captions[images, :length] = torch.where(better, caption, captions[images, :length])
        scores[images] = torch.where(better, score, scores[images])

        found += ended.isfinite().sum(1, keepdim=True)
        left = int((found < num_beams).sum())
        if left == 0:
            break
        total, order = total.masked_fill(ends, -torch.inf).topk(min(num_beams, total.shape[1]))  # [b, beams]
        rows, ids = rows.gather(1, order), ids.gather(1, order)
        kept = None
        if 2 * left <= b:
            kept = (found < num_beams).squeeze(1).nonzero().squeeze(1)
            images, found, total, rows, ids = images[kept], found[kept], total[kept], rows[kept], ids[kept]
        drafts.select(rows.flatten(), kept)
        drafts.extend(ids.flatten())
    return captions, scores.squeeze(1)
