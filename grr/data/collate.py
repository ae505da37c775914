"""Captions as the model reads them: padding at the end of the row, every token at its own position.

A caption of 65 ids is laid out BOS t1 ... tn EOS PAD ... PAD CLS PAD. Moving CLS directly behind EOS, and letting it
keep position 63, changes no result: causal attention then hides PAD from every token that matters, so no mask is
needed, and columns that hold nothing but padding can be cut off.
"""

import torch
from torch import Tensor

IGNORE = -100  # the label that cross-entropy skips


def right_pad(ids: Tensor, *, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Move the padding of each row to its end: ids [b, s] -> the same ids reordered [b, s], their old places [b, s].

    The second tensor is what rotary and absolute embeddings take as positions; `undo_right_pad` undoes the move.
    """
    positions = torch.argsort((ids == pad_id).to(torch.uint8), dim=1, stable=True)  # [b, s]
    return ids.gather(1, positions), positions


def undo_right_pad(x: Tensor, positions: Tensor) -> Tensor:
    """Put rows that `right_pad` reordered back into their first order: [b, s, d], [b, s] -> [b, s, d]."""
    return x.gather(1, torch.argsort(positions, dim=1).unsqueeze(-1).expand_as(x))


def collate_captions(rows: list[list[int]], *, pad_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Make a batch of captions: b rows of s + 1 ids, as `Tokenizer.encode` gives them -> ids and positions [b, t],
    labels [b, t - 2].

    t is the number of tokens of the longest caption, so nothing is computed for columns that are padding in all rows;
    the last two of those, its EOS and CLS, are followed by nothing that is learned, and have no column of labels.
    A label is the token that follows in the caption, and IGNORE where that is BOS, PAD or CLS (SPEC: equation 2).
    """
    whole = torch.tensor(rows)  # [b, s + 1]
    inputs, following = whole[:, :-1], whole[:, 1:]
    bos, cls = inputs[:, :1], inputs[:, -1:]  # [b, 1] each
    ignored = (following == pad_id) | (following == bos) | (following == cls)
    labels = following.masked_fill(ignored, IGNORE)  # [b, s]
    ids, positions = right_pad(inputs, pad_id=pad_id)
    longest = int((ids != pad_id).sum(1).max())
    return ids[:, :longest], positions[:, :longest], labels.gather(1, positions)[:, : longest - 2]
