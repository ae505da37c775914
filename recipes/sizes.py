"""Print what models cost: parameters and floating-point operations, tower by tower. Nothing is trained.

python recipes/sizes.py                                                the sizes that have a name
python recipes/sizes.py grr_coca "grr_coca dim=384 num_heads=6"        a name and arguments of its builder
python recipes/sizes.py --sweep recipes/configs/sweep/scaling.yaml     the variants of a sweep, before it runs
"""

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from grr.cli.program import run_main
from grr.evaluation.flops import Towers, forward_flops, parameters, training_flops
from grr.experiments.sweep import plan
from grr.models.builders import MODELS, T5_VOCABULARY
from grr.reports.charts import number
from grr.reports.table import aligned
from grr.tokenizers import open_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar='"name key=value ..."', help="default: all that have a name")
    parser.add_argument("--sweep", metavar="FILE", help="a config of recipes/sweep.py")
    parser.add_argument("--text-length", type=int, metavar="TOKENS", help="tokens of a caption; default: the context")
    options = parser.parse_args()
    if options.sweep:
        models = of_sweep(options.sweep)
    else:
        models = {words: of_words(*words.split()) for words in options.models or MODELS}
    if unknown := sorted({str(model["name"]) for model in models.values()} - set(MODELS)):
        parser.error(f"a model must be one of {', '.join(MODELS)}, got {', '.join(unknown)}")

    counts: list[list[str]] = [["parameters, M", "total", *Towers._fields]]
    costs: list[list[str]] = [["GFLOPs a pair", "training", "forward", *Towers._fields]]
    for label, model in models.items():
        builder = MODELS[model.pop("name")]
        try:
            with torch.device("meta"):
                towers = parameters(builder(**model))
            flops = forward_flops(builder, text_length=options.text_length, **model)
        except (TypeError, ValueError) as error:
            parser.error(f"{label}: {error}")
        counts.append([label, *(number(n / 1e6) for n in (towers.total, *towers))])
        costs.append([label, *(number(n / 1e9) for n in (training_flops(flops), flops.total, *flops))])
    print(f"{aligned(counts)}\n\n{aligned(costs)}")


def of_words(name: str, *overrides: str) -> dict[str, Any]:
    """A name and key=value ..., the values read as YAML."""
    arguments: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    return {"name": name, **arguments}


def of_sweep(file: str) -> dict[str, dict[str, Any]]:
    """The model of each variant: the section `model` of the first stage's config, and what is said instead of it."""
    run = OmegaConf.load(file).run
    jobs = plan(Path(run.folder), list(run.stages), list(run.variants), [0])
    return {job.variant: model_of(job.command()) for job in jobs if job.after is None}


def model_of(words: list[str]) -> dict[str, Any]:
    """The arguments of the model that a recipe's command line trains, with the vocabulary of its tokenizer."""
    config = OmegaConf.load(words[words.index("--config") + 1])
    config.merge_with_dotlist([word for word in words if word.startswith(("model.", "tokenizer."))])
    told = {key: p.default for key, p in inspect.signature(open_tokenizer).parameters.items()} | dict(config.tokenizer)
    vocab_size = T5_VOCABULARY if told["path"] else told["vocab_size"]
    arguments: Any = OmegaConf.to_container(config.model)
    return {**arguments, "vocab_size": vocab_size, "context_length": told["context_length"]}


if __name__ == "__main__":
    run_main(main)
