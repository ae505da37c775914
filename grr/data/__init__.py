"""Data: readers of formats as pairs of an image and a caption, their order, and the batches of a run."""

from collections.abc import Callable

from grr.data.augment import augmented
from grr.data.formats.annotations import coco, karpathy
from grr.data.formats.choices import Choices, aro, sugarcrepe, winoground
from grr.data.formats.image_folder import image_folder
from grr.data.formats.openmoji import openmoji
from grr.data.formats.openmoji_tasks import (
    check_disjoint,
    openmoji_choices,
    openmoji_classes,
    openmoji_entailment,
    openmoji_questions,
)
from grr.data.formats.shards import webdataset
from grr.data.formats.snli_ve import snli_ve
from grr.data.formats.tables import docci, folder, rocov2, urban1k
from grr.data.formats.vqa_v2 import vqa_v2
from grr.data.labelled import Labelled, check_classes, text_only_accuracy
from grr.data.loader import Batch, steps_per_epoch, training_steps, validation_steps
from grr.data.memory import InMemory
from grr.data.order import epoch_order
from grr.data.pairs import Pairs, pair_counts

DATASETS: dict[str, Callable[..., Pairs]] = {
    "openmoji": openmoji,
    "folder": folder,
    "coco": coco,
    "karpathy": karpathy,
    "rocov2": rocov2,
    "docci": docci,
    "urban1k": urban1k,
    "webdataset": webdataset,
}

LABELLED: dict[str, Callable[..., Labelled]] = {
    "openmoji_classes": openmoji_classes,
    "openmoji_questions": openmoji_questions,
    "openmoji_entailment": openmoji_entailment,
    "image_folder": image_folder,
    "vqa_v2": vqa_v2,
    "snli_ve": snli_ve,
}

CHOICES: dict[str, Callable[..., Choices]] = {
    "openmoji_choices": openmoji_choices,
    "sugarcrepe": sugarcrepe,
    "aro": aro,
    "winoground": winoground,
}

__all__ = [
    "CHOICES",
    "DATASETS",
    "LABELLED",
    "Batch",
    "Choices",
    "InMemory",
    "Labelled",
    "Pairs",
    "augmented",
    "check_classes",
    "check_disjoint",
    "epoch_order",
    "pair_counts",
    "steps_per_epoch",
    "text_only_accuracy",
    "training_steps",
    "validation_steps",
]
