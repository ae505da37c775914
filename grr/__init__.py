"""GRR: contrastive captioners (CoCa) built from the parts modern language models use.

Use a trained model; images are paths, Pillow images, arrays or tensors:

    import grr

    captioner = grr.load("runs/openmoji")  # a run's folder, its model/, or a checkpoint
    captioner.caption(["photo.jpg"])  # ["a red picture"]
    captioner.classify("photo.jpg", ["red", "blue"])  # [{"red": 0.9, "blue": 0.1}]
    captioner.embed_images("photo.jpg") @ captioner.embed_texts(["a red picture"]).T  # cosine similarities

Build a model, each of whose parts is an argument, and train it on any map-style data set:

    pairs = grr.Pairs.from_dataset(dataset, image="image", caption="caption")
    tokenizer = grr.train_tokenizer(pairs.captions, "my.model", vocab_size=64, context_length=16)
    with grr.process_group() as device:
        model = grr.create_model("grr_coca_tiny", vision_position="rope_2d", vocab_size=tokenizer.vocab_size)
        optimizer = grr.adamw(model.to(device), lr=1e-3)
        steps = grr.training_steps(
            pairs, tokenizer, rank=0, world=1, seed=0, start_step=0, batch_size=4, micro_batch_size=4, image_size=32,
            pin_memory=False,
        )
        for step, batches in zip(range(3), steps):
            losses = grr.global_batch_step(model, [batch.to(device) for batch in batches], seed=step)
            optimizer.step()
            optimizer.zero_grad()
            print(step, losses.read().loss)  # waits for the device

The recipes are training loops of that kind with validation, checkpoints and a report: `grr ls` lists them. Further
names are in the packages `grr.components`, `grr.builders`, `grr.data`, `grr.models`, `grr.training`, `grr.evaluation`
and the others. A name is imported when it is first used, so `import grr` does not import torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grr import builders as builders
    from grr import checkpoint as checkpoint
    from grr import components as components
    from grr import config as config
    from grr import data as data
    from grr import evaluation as evaluation
    from grr import experiments as experiments
    from grr import export as export
    from grr import files as files
    from grr import generation as generation
    from grr import inference as inference
    from grr import models as models
    from grr import parallel as parallel
    from grr import reports as reports
    from grr import tokenizers as tokenizers
    from grr import training as training
    from grr.data import Batch, Pairs, training_steps
    from grr.data.collate import collate_captions
    from grr.data.images import load_image
    from grr.generation.generate import generate
    from grr.inference.captioner import Captioner
    from grr.inference.pretrained import load
    from grr.models.builders import (
        baseline_coca,
        baseline_vit,
        create_model,
        grr_coca,
        grr_coca_tiny,
        grr_vit,
        list_models,
        original_coca,
    )
    from grr.models.coca import CoCa
    from grr.parallel.process_group import process_group
    from grr.tokenizers import Tokenizer, train_tokenizer
    from grr.training.loss import captioning_loss, contrastive_loss, sigmoid_loss
    from grr.training.optim import adamw
    from grr.training.schedule import warmup_cosine
    from grr.training.step import global_batch_step

_text_files = [
    file for name in ("components", "recipes") if os.path.isfile(file := os.path.join(os.path.dirname(__file__), name))
]
if _text_files:  # git writes a link as a text file where core.symlinks is false, as on Windows
    raise ImportError(
        f"grr: grr/components and grr/recipes must be links to folders, got text files, {', '.join(_text_files)}; in "
        "the clone run `git config core.symlinks true` and `git checkout -- grr/components grr/recipes` (on Windows, "
        "turn on developer mode first), or install the wheel, which holds the folders themselves"
    )

# How threads wait for each other, read when torch is loaded. By default they spin for milliseconds, on cores that other
# programs or the awaited thread itself need; where they sleep at once, waking them takes as long as a small operation.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # some 30 microseconds; of GNU's OpenMP, which torch has on Linux

__version__ = "0.2.0"

__all__ = [
    "Batch",
    "Captioner",
    "CoCa",
    "Pairs",
    "Tokenizer",
    "__version__",
    "adamw",
    "baseline_coca",
    "baseline_vit",
    "captioning_loss",
    "collate_captions",
    "contrastive_loss",
    "create_model",
    "generate",
    "global_batch_step",
    "grr_coca",
    "grr_coca_tiny",
    "grr_vit",
    "list_models",
    "load",
    "load_image",
    "original_coca",
    "process_group",
    "sigmoid_loss",
    "train_tokenizer",
    "training_steps",
    "warmup_cosine",
]

# The modules of the public names, by section; docs/api.md lists them in this order.
_SECTIONS = {
    "Use a trained model": {
        "load": "grr.inference.pretrained",
        "Captioner": "grr.inference.captioner",
        "generate": "grr.generation.generate",
    },
    "Build a model": {
        "create_model": "grr.models.builders",
        "list_models": "grr.models.builders",
        "grr_coca": "grr.models.builders",
        "baseline_coca": "grr.models.builders",
        "original_coca": "grr.models.builders",
        "grr_coca_tiny": "grr.models.builders",
        "grr_vit": "grr.models.builders",
        "baseline_vit": "grr.models.builders",
        "CoCa": "grr.models.coca",
    },
    "Read data": {
        "Pairs": "grr.data.pairs",
        "Tokenizer": "grr.tokenizers.sentencepiece",
        "train_tokenizer": "grr.tokenizers.sentencepiece",
        "load_image": "grr.data.images",
        "collate_captions": "grr.data.collate",
        "Batch": "grr.data.loader",
        "training_steps": "grr.data.loader",
    },
    "Train": {
        "contrastive_loss": "grr.training.loss",
        "captioning_loss": "grr.training.loss",
        "sigmoid_loss": "grr.training.loss",
        "global_batch_step": "grr.training.step",
        "adamw": "grr.training.optim",
        "warmup_cosine": "grr.training.schedule",
        "process_group": "grr.parallel.process_group",
    },
}
_MODULES = {name: module for names in _SECTIONS.values() for name, module in names.items()}
_PACKAGES = (
    *("builders", "checkpoint", "components", "config", "data", "evaluation", "experiments", "export", "files"),
    *("generation", "inference", "models", "parallel", "reports", "tokenizers", "training"),
)


if not TYPE_CHECKING:  # type checkers would take any name of a module with __getattr__

    def __getattr__(name: str) -> Any:
        """Import a public name or a package when it is first used (PEP 562)."""
        if name in _PACKAGES:
            return import_module(f"grr.{name}")
        if name not in _MODULES:
            raise AttributeError(f"module 'grr' has no attribute {name!r}; dir(grr) lists the public names")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_PACKAGES})
