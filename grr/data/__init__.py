"""Images with captions: formats behind one interface, one order, and the batches of a run."""

from collections.abc import Callable

from grr.data.annotations import coco, karpathy
from grr.data.loader import Batch, steps_per_epoch, training_steps, validation_steps
from grr.data.memory import InMemory
from grr.data.openmoji import openmoji
from grr.data.order import epoch_order
from grr.data.pairs import Pairs
from grr.data.shards import webdataset
from grr.data.tables import folder, rocov2

DATASETS: dict[str, Callable[..., Pairs]] = {
    "openmoji": openmoji,
    "folder": folder,
    "coco": coco,
    "karpathy": karpathy,
    "rocov2": rocov2,
    "webdataset": webdataset,
}

__all__ = [
    "DATASETS",
    "Batch",
    "InMemory",
    "Pairs",
    "epoch_order",
    "steps_per_epoch",
    "training_steps",
    "validation_steps",
]
