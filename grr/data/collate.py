"""Batches of captions: padding at the end of the row, every token with its original position.

The layout of a caption of 65 ids is BOS t1 ... tn EOS PAD ... PAD CLS PAD. Moving CLS directly after EOS, with its
position 63, does not change the results: causal attention then hides PAD from all other tokens without a mask, and
columns that are padding in all rows can be dropped.
"""

import torch
from torch import Tensor

IGNORE = -100  # the label that cross-entropy skips


def right_pad(ids: Tensor, *, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Move the padding of each row to its end: ids [b, s] -> reordered ids [b, s] and their original columns [b, s].

    The original columns are the positions for rotary and absolute embeddings; `undo_right_pad` inverts the move.
    """
    positions = torch.argsort((ids == pad_id).to(torch.uint8), dim=1, stable=True)  # [b, s]
    return ids.gather(1, positions), positions


def undo_right_pad(x: Tensor, positions: Tensor) -> Tensor:
    """Restore the order that rows had before `right_pad`: [b, s, d], positions [b, s] -> [b, s, d]."""
    return x.gather(1, torch.argsort(positions, dim=1).unsqueeze(-1).expand_as(x))


def collate_captions(rows: list[list[int]], *, pad_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Collate captions: b rows of s + 1 ids, as `Tokenizer.encode` returns them -> ids and positions [b, t],
    labels [b, t - 2].

    t is the number of tokens of the longest caption, so columns that are padding in all rows are not computed; labels
    end two columns earlier, because after EOS and CLS there is nothing to predict. A label is the next token of the
    caption, and IGNORE where that is BOS, PAD or CLS (SPEC: equation 2). Raises ValueError if there is no row.
    """
    if len(rows) == 0:
        raise ValueError("collate_captions: rows must have at least one caption, got none; leave out an empty batch")
    whole = torch.tensor(rows)  # [b, s + 1]
    inputs, following = whole[:, :-1], whole[:, 1:]
    bos, cls = inputs[:, :1], inputs[:, -1:]  # [b, 1] each
    ignored = (following == pad_id) | (following == bos) | (following == cls)
    labels = following.masked_fill(ignored, IGNORE)  # [b, s]
    ids, positions = right_pad(inputs, pad_id=pad_id)
    longest = int((ids != pad_id).sum(1).max())
    return ids[:, :longest], positions[:, :longest], labels.gather(1, positions)[:, : longest - 2]
