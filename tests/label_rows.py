"""Labels of a batch, row by row, as a test reads them most easily."""

import torch
from torch import Tensor

from grr.data import Batch
from grr.data.collate import IGNORE, CaptionBatch


def label_rows(batch: Batch | CaptionBatch) -> Tensor:
    """Returns the labels by token, [b, t]; IGNORE where a token has none."""
    rows = torch.full(batch.ids.shape, IGNORE)
    rows.view(-1)[batch.label_places[: batch.num_labels]] = batch.labels[: batch.num_labels]
    return rows
