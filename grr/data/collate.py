"""Batches of captions: padding at the end of the row, every token with its original position.

The layout of a caption of 65 ids is BOS t1 ... tn EOS PAD ... PAD CLS PAD. Moving CLS directly after EOS, with its
position 63, does not change the results: causal attention then hides PAD from all other tokens without a mask, and
columns that are padding in all rows can be dropped.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from grr.data.pairs import Texts

IGNORE = -100  # the label that cross-entropy skips
LABEL_MULTIPLE = 64
ENCODED = 8192  # captions of a global batch that each process encodes to order them, in about a tenth of a second
LONGEST = np.iinfo(np.uint16).max  # tokens; captions beyond count as equally long


def right_pad(ids: Tensor, *, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Move the padding of each row to its end: ids [b, s] -> reordered ids [b, s] and their original columns [b, s].

    The original columns are the positions for rotary and absolute embeddings; `undo_right_pad` inverts the move.
    """
    positions = torch.argsort((ids == pad_id).to(torch.uint8), dim=1, stable=True)  # [b, s]
    return ids.gather(1, positions), positions


def undo_right_pad(x: Tensor, positions: Tensor) -> Tensor:
    """Restore the order that rows had before `right_pad`: [b, s, d], positions [b, s] -> [b, s, d]."""
    return x.gather(1, torch.argsort(positions, dim=1).unsqueeze(-1).expand_as(x))


class CaptionBatch(NamedTuple):
    """Captions of a batch, of few different shapes where text_multiple asks for it, because each is compiled."""

    ids: Tensor  # int64 [b, t]; t is a multiple of `text_multiple`, or the context length
    positions: Tensor  # int64 [b, t], of the tokens in the tokenizer's layout
    cls_places: Tensor  # int64 [b], the column of CLS
    label_places: Tensor  # int64 [n], row * t + column of each token with a label; n is a multiple of LABEL_MULTIPLE
    labels: Tensor  # int64 [n], the next token; IGNORE, at place 0, in the rows that fill n
    num_labels: int  # labels that are not IGNORE


def collate_captions(
    rows: list[list[int]], *, pad_id: int = 0, labelled: Sequence[bool] | None = None, text_multiple: int = 1
) -> CaptionBatch:
    """Collate captions: b rows of s + 1 ids, as `Tokenizer.encode` returns them.

    t is the number of tokens of the longest caption, rounded up to a multiple of text_multiple, so columns that are
    padding in all rows are not computed. A label is the next token of the caption; a token has none where that is BOS,
    PAD or CLS (SPEC: equation 2), or where `labelled` is false for its row. Raises ValueError if there is no row.
    """
    if len(rows) == 0:
        raise ValueError("collate_captions: rows must have at least one caption, got none; leave out an empty batch")
    whole = torch.tensor(rows)  # [b, s + 1]
    inputs, following = whole[:, :-1], whole[:, 1:]
    bos, cls = inputs[:, :1], inputs[:, -1:]  # [b, 1] each
    has_label = (following != pad_id) & (following != bos) & (following != cls)  # [b, s]
    if labelled is not None:
        has_label &= torch.tensor(labelled).unsqueeze(1)
    ids, positions = right_pad(inputs, pad_id=pad_id)
    lengths = (ids != pad_id).sum(1)  # [b]
    t = min(_round_up(int(lengths.max()), text_multiple), ids.shape[1])
    places = has_label.gather(1, positions)[:, :t].flatten().nonzero().squeeze(1)  # [n]
    labels = following.gather(1, positions)[:, :t].flatten()[places]
    n = len(places)
    filling = _round_up(max(n, 1), LABEL_MULTIPLE) - n
    return CaptionBatch(
        ids[:, :t].contiguous(),
        positions[:, :t].contiguous(),
        lengths - 1,
        F.pad(places, (0, filling)),
        F.pad(labels, (0, filling), value=IGNORE),
        n,
    )


class LongestFirst:
    """Order of samples by the length of their captions in tokens, the longest first; equal ones stay as they were.

    A global batch in this order, cut into micro-batches, has few columns that are only padding. A caption is encoded
    once, and its length kept in 2 bytes. A batch of more than ENCODED captions is ordered by their bytes instead, with
    a fifth more columns, because every process would have to encode all of it before a step.
    """

    def __init__(self, captions: Texts | Sequence[str], encode: Callable[[str], list[int]], *, pad_id: int = 0) -> None:
        self.captions, self.encode, self.pad_id = captions, encode, pad_id
        self.lengths = np.zeros(len(captions), dtype=np.uint16)  # by sample; 0: not encoded yet

    def __call__(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        if len(samples) > ENCODED:
            sizes = [len(self.captions[i].encode()) for i in samples.tolist()]
            return samples[np.argsort(-np.array(sizes), kind="stable")]
        for i in samples[self.lengths[samples] == 0].tolist():
            ids = self.encode(self.captions[i])
            self.lengths[i] = min(len(ids) - ids.count(self.pad_id), LONGEST)
        return samples[np.argsort(-self.lengths[samples].astype(np.int64), kind="stable")]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
