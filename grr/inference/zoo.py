"""Published contrastive captioners that this library reads by name, from zoo.json, which names its sources."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("zoo.json")


class Published(NamedTuple):
    """A published model."""

    name: str  # owner/name of its repository on the Hugging Face hub
    builder: str  # a name of grr.models.open_clip.OPEN_CLIP_MODELS
    context_length: int  # with CLS
    parameters: int
    license: str  # as its metadata on the hub name it


@cache
def zoo() -> dict[str, Published]:
    """Returns the published models by owner/name."""
    models = [Published(**row) for row in json.loads(FILE.read_text(encoding="utf-8"))["models"]]
    return {model.name: model for model in models}
