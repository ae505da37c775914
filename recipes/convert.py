"""Convert a checkpoint of open_clip's CoCa to a model of this library.

    python recipes/convert.py --config recipes/configs/convert/open_clip_coca_vit_b_32.yaml \\
        run.checkpoint=open_clip_pytorch_model.bin

Nothing is downloaded: checkpoint and vocabulary are local files. All recipes with model.path read the result, and so
does Python:

    captioner = grr.load("models/open_clip_coca_vit_b_32")
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from grr import config  # before torch: grr sets how its threads wait

# isort: split
import torch

from grr.checkpoint.model_folder import save_model
from grr.cli.program import run_main
from grr.inference.convert import convert_open_clip, read_open_clip
from grr.inference.pretrained import describe
from grr.models.open_clip import OPEN_CLIP_MODELS
from grr.tokenizers import ClipTokenizer, installed_merges


@dataclass
class Run:
    """Options of the recipe."""

    checkpoint: str  # .pt, .bin or .safetensors, with open_clip's names
    folder: str  # for weights, description and vocabulary
    merges: str | None = None  # bpe_simple_vocab_16e6.txt.gz or merges.txt; null: from the installed open_clip


SECTIONS: config.Sections = {"run": Run, "model": OPEN_CLIP_MODELS}


def main() -> None:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    check_files(run)

    # vocabulary
    merges = Path(run.merges) if run.merges else installed_merges()
    tokenizer = ClipTokenizer(merges, context_length=cfg.model["context_length"])
    if tokenizer.vocab_size != cfg.model["vocab_size"]:
        raise ValueError(
            f"convert: the vocabulary must have model.vocab_size={cfg.model['vocab_size']} ids, got "
            f"{tokenizer.vocab_size} in {merges}; set run.merges to the merges of the training"
        )

    # weights: the model is built on the meta device, and gets the converted tensors
    print(f"reading {run.checkpoint}", flush=True)
    with torch.device("meta"):
        model = cfg.build("model")
    model.load_state_dict(convert_open_clip(read_open_clip(run.checkpoint), model), assign=True)

    print(f"writing {run.folder}", flush=True)
    description = describe(cfg.model["name"], {k: v for k, v in cfg.model.items() if k != "name"}, "clip")
    save_model(Path(run.folder), model, description, merges)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{run.folder}: {cfg.model['name']}, {parameters:,} parameters")


def check_files(run: Run) -> None:
    """Raises ValueError that lists all missing files and packages, before any file is read."""
    faults = []
    if not Path(run.checkpoint).is_file():
        faults.append(
            f"the file {run.checkpoint} does not exist; run.checkpoint is open_clip_pytorch_model.bin or "
            "open_clip_model.safetensors of a CoCa of open_clip"
        )
    if run.merges is None:
        try:
            installed_merges()
        except FileNotFoundError as error:
            faults.append(f"{error} as run.merges")
    elif not Path(run.merges).is_file():
        faults.append(f"the file {run.merges} does not exist; run.merges is bpe_simple_vocab_16e6.txt.gz or merges.txt")
    if importlib.util.find_spec("ftfy") is None:
        faults.append('ftfy, which the tokenizer needs, is not installed; pip install "grr-coca[clip]"')
    if faults:
        raise ValueError("\n  ".join(["convert:", *faults]) if len(faults) > 1 else f"convert: {faults[0]}")


if __name__ == "__main__":
    run_main(main)
