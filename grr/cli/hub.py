"""The commands models and push: published models that are read by name, and uploads to the Hugging Face hub."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from grr.cli.parser import add_command


def add_models(subparsers: Any) -> None:
    add_command(
        subparsers,
        list_published,
        "models",
        "List published contrastive captioners that are read by name.",
        """
        Any repository on the Hugging Face hub in this library's layout or in open_clip's is read by its name, not only
        these. The context length includes CLS. Models whose licence is apple-amlr are for research only: read it on
        the page of the model.

        Next: grr caption hf-hub:laion/CoCa-ViT-B-32-laion2B-s13B-b90k photos
        """,
    )


def list_published(options: argparse.Namespace) -> int:
    """Print the table of published models."""
    from grr.inference.zoo import zoo
    from grr.reports.table import aligned

    table = [["name", "context", "parameters", "licence"]]
    for model in zoo().values():
        parameters = f"{model.parameters / 1e6:.1f} M"
        table.append([f"hf-hub:{model.name}", str(model.context_length), parameters, model.license])
    print(aligned(table))
    print("Their layouts are tested with random weights; the published weights themselves have not been tested.")
    return 0


def add_push(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        push,
        "push",
        "Upload a trained model to the Hugging Face hub, with a model card.",
        """
        Uploads config.json, model.safetensors and tokenizer.model of the model, and README.md: how to load it, its
        data, sizes and numbers from the files of the run, its curves as a picture, and its licence. Log in first with
        `hf auth login`, or set HF_TOKEN.

          grr push runs/openmoji me/openmoji --license apache-2.0

        Next: grr caption hf-hub:me/openmoji photos
        """,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, its model/, or one of its checkpoints/step_N")
    parser.add_argument(
        "repository", metavar="NAME", help="owner/name of the repository, which is created if it is new"
    )
    parser.add_argument("--license", metavar="ID", help="as the hub spells it, such as mit or apache-2.0")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")


def push(options: argparse.Namespace) -> int:
    """Upload a model with its card and print where it is."""
    import torch

    from grr.inference.hub import push as upload
    from grr.inference.hub import split_name
    from grr.inference.pretrained import build_pretrained, find_pretrained, load_pretrained
    from grr.reports.card import curves, model_card

    name = split_name(options.repository, who="push")[0]
    source = find_pretrained(options.run)
    run = next(
        (folder for folder in (source.path, *source.path.parents[:2]) if (folder / "config.yaml").is_file()), None
    )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_pretrained(source).parameters())
    facts = {"builder": source.builder, "parameters": parameters, **source.arguments, "crop": source.crop}
    with TemporaryDirectory() as place:
        folder = source.path
        if not (folder / "model.safetensors").is_file() or source.open_clip is not None:  # a checkpoint, or converted
            folder = Path(place, "model")
            load_pretrained(source).save_pretrained(folder)
        files: dict[str, Path | bytes] = {
            file: folder / file for file in ("config.json", "model.safetensors", "tokenizer.model")
        }
        facts["quantization"] = source.quantization
        files["README.md"] = model_card(name, run, facts, options.license).encode()
        if run is not None and (picture := curves(run)) is not None:
            files["curves.png"] = picture
        print(upload(files, options.repository, private=options.private))
    print(f"next: grr caption hf-hub:{name} photos")
    return 0
