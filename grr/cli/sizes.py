"""The command sizes: parameters and floating-point operations (FLOPs) of models, by tower."""

import argparse
import inspect
from pathlib import Path
from typing import Any

from grr.cli.parser import add_command, count
from grr.experiments import catalog

Arguments = dict[str, Any]  # of a model's builder, and its name


def add_sizes(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        sizes,
        "sizes",
        "Print the parameters and floating-point operations of models.",
        """
        Counted per tower. No model is trained.

          grr sizes                                             every model that has a name
          grr sizes grr_coca "grr_coca dim=384 num_heads=6"     a name and arguments of its builder
          grr sizes --sweep sweep/scaling                       the variants of a sweep

        Next: grr run pretrain/openmoji model.name=grr_coca_tiny
        """,
    )
    parser.add_argument("models", nargs="*", metavar='"NAME key=value ..."', help="default: all names")
    parser.add_argument("--sweep", metavar="CONFIG", help="a config of the recipe sweep: a file, or an installed name")
    parser.add_argument(
        "--text-length", type=count, metavar="TOKENS", help="tokens per caption; default: the model's context length"
    )


def sizes(options: argparse.Namespace) -> int:
    """Print a table of parameters and a table of operations."""
    import torch

    from grr.evaluation.flops import Towers, flops_are_known, forward_flops, parameters, training_flops
    from grr.models.builders import MODELS, create_model
    from grr.models.open_clip import OPEN_CLIP_MODELS
    from grr.reports.charts import number
    from grr.reports.table import aligned

    builders = MODELS | OPEN_CLIP_MODELS
    if options.sweep:
        models = _variants(catalog.config_file(options.sweep))
    else:
        models = {words: _parse_model(words) for words in options.models or builders}
    if unknown := sorted({str(arguments["name"]) for arguments in models.values()} - set(builders)):
        raise ValueError(
            f"a model must be one of {', '.join(builders)}, got {', '.join(unknown)}; grr --import MODULE adds those "
            "of your own module"
        )

    counts: list[list[str]] = [["parameters, M", "total", *Towers._fields]]
    costs: list[list[str]] = [["GFLOPs a pair", "training", "forward", *Towers._fields]]
    unknown_flops = False
    for label, arguments in models.items():
        builder = builders[name := arguments.pop("name")]
        try:
            with torch.device("meta"):
                towers = parameters(create_model(name, **arguments))
            known = flops_are_known(builder)
            length = {"text_length": options.text_length}
            flops = forward_flops(builder, **length, **arguments) if known else None
            trained = training_flops(builder, **length, **arguments) if known else None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{label}: {error}") from error
        counts.append([label, *(number(n / 1e6) for n in (towers.total, *towers))])
        if flops is None or trained is None:
            unknown_flops = True
            costs.append([label, *"-" * (len(costs[0]) - 1)])
        else:
            costs.append([label, *(number(n / 1e9) for n in (trained, flops.total, *flops))])
    print(f"{aligned(counts)}\n\n{aligned(costs)}")
    if unknown_flops:
        print("\n-: FLOPs are known for the presets of coca only.")
    return 0


def _parse_model(words: str) -> Arguments:
    """A name and key=value ..., whose values are YAML."""
    from omegaconf import OmegaConf

    name, *overrides = words.split()
    arguments: Any = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    return {"name": name, **arguments}


def _variants(file: Path) -> dict[str, Arguments]:
    """The model that the first stage of each variant of a sweep trains."""
    from omegaconf import OmegaConf

    from grr.experiments.sweep import plan

    run = OmegaConf.load(file).run
    jobs = plan(Path(run.folder), list(run.stages), list(run.variants), [0])
    return {job.variant: _model_of(job.command()) for job in jobs if job.after is None}


def _model_of(command: list[str]) -> Arguments:
    """The model that a recipe's command line trains, with the vocabulary size and context length of its tokenizer."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(command[command.index("--config") + 1])
    config.merge_with_dotlist([word for word in command if word.startswith(("model.", "tokenizer."))])
    return with_tokenizer(OmegaConf.to_container(config.model), dict(config.tokenizer))


def with_tokenizer(model: Any, tokenizer: Arguments) -> Arguments:
    """Returns the arguments of a model, with the vocabulary size and the context length of a config's tokenizer."""
    from grr.models.builders import T5_VOCABULARY
    from grr.tokenizers import open_tokenizer

    defaults = {key: parameter.default for key, parameter in inspect.signature(open_tokenizer).parameters.items()}
    tokenizer = defaults | tokenizer
    vocab_size = T5_VOCABULARY if tokenizer["path"] else tokenizer["vocab_size"]
    return {**model, "vocab_size": vocab_size, "context_length": tokenizer["context_length"]}
