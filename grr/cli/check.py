"""A config before hours are spent on it: what its recipe would refuse, and a look at the data it names."""

import dataclasses
import importlib.util
import inspect
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from grr import config
from grr.data import Labelled, Pairs, check_classes, steps_per_epoch, training_steps, validation_steps
from grr.data.inspect import (
    MAX_CAPTIONS,
    Data,
    Finding,
    check_captions,
    check_counts,
    check_epoch,
    check_false_negatives,
    check_images,
    check_overlap,
    check_records,
    check_tokens,
    check_unused_images,
    sample_numbers,
)
from grr.data.order import check_negatives
from grr.data.pairs import ImageFiles
from grr.experiments import catalog as installed
from grr.experiments.sweep import plan
from grr.inference.pretrained import Pretrained, build_pretrained, find_pretrained
from grr.seeds import derive_seed
from grr.tokenizers import Tokenizer, load_tokenizer, open_tokenizer
from grr.training.cost import RunPlan, run_cost
from grr.training.optim import freeze
from grr.training.schedule import warmup_cosine
from grr.training.step import global_batch_step

HELD_OUT = {"validation": "data", "labelled": "labelled_train"}  # sections, and those they may share no image with
SIZE = 224  # of images, where neither a config nor a model says it


def read_config(file: Path, overrides: Sequence[str], recipe: Path) -> tuple[config.Config, config.Sections]:
    """A config as its recipe reads it, and the functions of its sections.

    Raises ConfigError with all mistakes, and what the recipe's function `validate_config`, if it has one, raises.
    ValueError if the recipe has no SECTIONS.
    """
    sections, validate_config = recipe_sections(recipe)
    cfg = config.load(sections, ["--config", str(file), *overrides])
    validate_config(cfg)
    return cfg, sections


def recipe_sections(recipe: Path) -> tuple[config.Sections, Callable[[config.Config], None]]:
    """Returns the SECTIONS of a recipe and its `validate_config`, or a function that accepts every config.

    Raises ValueError if the recipe has no SECTIONS.
    """
    module = _module(recipe)
    if not hasattr(module, "SECTIONS"):
        raise ValueError(
            f"check: {recipe} must have the sections of its config at module level, got none; add "
            'SECTIONS = {"run": Run, ...} and read it by config.load(SECTIONS)'
        )
    return module.SECTIONS, getattr(module, "validate_config", _accept)


def check(
    cfg: config.Config, sections: config.Sections, *, every: bool = False, processes: int = 1
) -> Iterator[Finding]:
    """Open all that a config names, and look at a sample of its images and captions, or at `every` one.

    processes: of the run, over all machines, which its batches must fit. Nothing is written but the index of tar
    shards. What cannot be opened is a finding, too. Raises ValueError if there is no process.
    """
    if processes < 1:
        raise ValueError(f"check: a run has at least one process, got {processes=}")
    for section, function in sections.items():
        if dataclasses.is_dataclass(function):  # options that may exclude each other
            try:
                cfg.build(section)
            except ValueError as error:
                yield _refused(section, error)
    if {"stages", "variants", "seeds", "overrides"} <= _section(cfg, "run").keys():
        yield from _runs(cfg.run)

    # data
    opened: dict[str, Data] = {}
    for section in sections:
        if _gives(Pairs, cfg, sections[section], section):
            try:
                opened[section] = Data(section, cfg.build(section))
            except (ValueError, OSError, ImportError) as error:
                yield _refused(section, error)

    # model and tokenizer
    source, tokenizer, wide = None, None, None
    try:
        source = _pretrained(cfg)
    except (ValueError, OSError) as error:
        yield _refused("model", error)
    try:
        tokenizer, wide = _tokenizers(cfg, sections, source, opened.get("data"))
    except (ValueError, OSError, ImportError) as error:
        yield _refused("tokenizer", error)
    if tokenizer is not None:
        yield Finding("tokenizer", f"{tokenizer.vocab_size:,} ids, {tokenizer.context_length} tokens at a time")
    if source is not None:
        yield Finding("model", f"{source.builder} from {source.path}")
    elif "path" not in _section(cfg, "model") and "model" in sections:
        yield from _new_model(cfg, sections["model"], tokenizer)

    # images and captions
    size = source.arguments["image_size"] if source else _section(cfg, "model").get("image_size", SIZE)
    crop = _section(cfg, "loader").get("crop", source.crop if source else "squash")
    pixels: dict[str, set[bytes]] = {}
    for section, data in opened.items():
        arguments = _section(cfg, section)
        yield Finding(section, ", ".join(f"{key}={value}" for key, value in arguments.items() if value is not None))
        findings = [*check_records(data, every=every), *check_counts(data), *check_captions(data)]
        if tokenizer is not None and wide is not None:
            findings += check_tokens(data, wide, tokenizer.context_length, every=every)
        pixels[section], seen = check_images(data, size=size, crop=crop, every=every)
        findings += seen
        if isinstance(data.source, ImageFiles):
            findings += check_unused_images(data.source, _splits(sections[section], arguments, data.source))
        yield from (finding._replace(what=f"  {finding.what}") for finding in findings)
    for held_out, train in HELD_OUT.items():
        if held_out in opened and train in opened:
            equal = len(pixels[held_out] & pixels[train])
            yield from check_overlap(opened[held_out], opened[train], equal, every=every)
            yield from _other_classes(opened[train].pairs, opened[held_out].pairs, held_out)
    if "data" in opened and tokenizer is not None:
        yield from _steps(cfg, sections, opened, tokenizer, source, size, processes)


@cache
def _module(file: Path) -> ModuleType:
    """A recipe's file as a module, wherever it lies, with what it imports from beside it, as if it were started; what
    it does then is not done.
    """
    if not file.is_file():
        raise FileNotFoundError(f"check: there is no recipe {file}")
    name = f"grr_recipe_{file.stem}_{derive_seed(str(file.resolve()))}"  # recipes of one name lie in many folders
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their types up there
    sys.path.insert(0, str(file.absolute().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _accept(cfg: config.Config) -> None: ...


def _section(cfg: config.Config, section: str) -> dict[str, Any]:
    """The arguments of a section, none if the recipe has no such section."""
    return vars(cfg).get(section, {})


def _refused(what: str, error: Exception) -> Finding:
    return Finding(what, " ".join(str(error).split()), wrong=True)


def _gives(kind: type, cfg: config.Config, function: config.Section, section: str) -> bool:
    """Whether the function that a section chose says that it gives such a thing."""
    if isinstance(function, Mapping):
        function = function[_section(cfg, section)["name"]]
    gives = None if inspect.isclass(function) else inspect.signature(function, eval_str=True).return_annotation
    return inspect.isclass(gives) and issubclass(gives, kind)


def _pretrained(cfg: config.Config) -> Pretrained | None:
    """The trained model that a config names, if it names one."""
    path = _section(cfg, "model").get("path")
    return None if path is None else find_pretrained(path)


def _tokenizers(
    cfg: config.Config, sections: config.Sections, source: Pretrained | None, train: Data | None
) -> tuple[Tokenizer | None, Tokenizer | None]:
    """The tokenizer of the run, and one of the same words that reads four times as much."""
    if source is not None:
        file, context_length = source.tokenizer, source.arguments["context_length"]
        return load_tokenizer(file, context_length=context_length), load_tokenizer(
            file, context_length=4 * context_length
        )
    if "tokenizer" not in sections or train is None:
        return None, None
    captions = [train.pairs.captions[i] for i in sample_numbers(len(train.pairs), MAX_CAPTIONS)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = open_tokenizer(captions, Path(folder, "tokenizer.model"), **cfg.tokenizer)
        return tokenizer, load_tokenizer(Path(folder, "tokenizer.model"), context_length=4 * tokenizer.context_length)


def _new_model(cfg: config.Config, function: config.Section, tokenizer: Tokenizer | None) -> Iterator[Finding]:
    """Build the model without memory: sizes that do not fit each other are refused there."""
    if not _gives(nn.Module, cfg, function, "model"):
        return
    if tokenizer is not None:
        cfg.model |= {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
    try:
        with torch.device("meta"):
            model = cfg.build("model")
        yield Finding("model", f"{cfg.model['name']}, {sum(p.numel() for p in model.parameters()):,} parameters")
    except (ValueError, TypeError, RuntimeError) as error:
        yield _refused("model", error)


def _splits(function: config.Section, arguments: dict[str, Any], own: ImageFiles) -> Iterator[ImageFiles]:
    """The same data in every split that they have."""
    if "split" not in arguments or not isinstance(function, Mapping):
        return
    others = {key: value for key, value in arguments.items() if key != "name"}
    for split in ("train", "validation", "test"):
        logging.disable(logging.WARNING)  # what was skipped is a finding of the first split already
        try:
            pairs = function[arguments["name"]](**others | {"split": split})
        except (ValueError, OSError):  # there is no such split
            continue
        finally:
            logging.disable(logging.NOTSET)
        if isinstance(pairs, ImageFiles) and pairs.root == own.root:
            yield pairs


def _other_classes(train: Pairs, held_out: Pairs, section: str) -> Iterator[Finding]:
    if isinstance(train, Labelled) and isinstance(held_out, Labelled):
        try:
            check_classes(train, held_out)
        except ValueError as error:
            yield _refused(section, error)


def _runs(sweep: dict[str, Any]) -> Iterator[Finding]:
    """The config of every run of a sweep, of its first seed."""
    folder, seeds = Path(sweep["folder"]), sweep["seeds"]
    try:
        jobs = plan(folder, sweep["stages"], sweep["variants"], seeds, sweep["overrides"])
    except ValueError as error:
        yield _refused("run", error)
        return
    said: dict[str, None] = {}  # what is wrong with several is told once
    for job in (job for job in jobs if job.seed == seeds[0]):
        try:
            command = job.command()
            recipe = Path(command[installed.recipe_place(command)])
            if not installed.is_own(recipe):
                said[f"{recipe}: a recipe that only a config names is not imported by a check"] = None
            elif "--config" in command:
                file = Path(command[command.index("--config") + 1])
                read_config(file, [word for word in command if config.OVERRIDE.match(word)], recipe)
        except ValueError as error:
            said[f"{job.name}: {' '.join(str(error).split())}"] = None
    for line in said:
        yield Finding("runs", line, wrong=True)
    if not said:
        yield Finding("runs", f"{len(jobs):,}, in {len(sweep['stages'])} stages; their configs hold no mistake")


def _steps(
    cfg: config.Config,
    sections: config.Sections,
    opened: Mapping[str, Data],
    tokenizer: Tokenizer,
    source: Pretrained | None,
    size: int,
    processes: int,
) -> Iterator[Finding]:
    """The optimizer steps of a training run; what its batches, in so many processes, and its schedule do not allow."""
    run, loader, data = _section(cfg, "run"), _section(cfg, "loader"), opened["data"]
    if not loader or not {"batch_size", "micro_batch_size"} <= run.keys():
        return
    contrasted = sections.get("loss") is global_batch_step
    try:
        batches = {
            "rank": 0,
            "world": processes,
            "batch_size": run["batch_size"],
            "image_size": size,
            "micro_batch_size": run["micro_batch_size"],
            "pin_memory": False,
            **loader,
        }
        training_steps(data.pairs, tokenizer, seed=0, start_step=0, **batches)
        if "validation" in opened:
            validation_steps(opened["validation"].pairs, tokenizer, **batches)
        per_epoch = steps_per_epoch(data.pairs, run["batch_size"])
        if sections.get("schedule") is warmup_cosine:
            warmup_cosine(0, per_epoch, cfg.optimizer["lr"], **cfg.schedule)
        if contrasted:
            check_negatives(run["batch_size"], run["micro_batch_size"], cfg.loss["negatives"])
    except ValueError as error:
        yield _refused("steps", error)
        return
    replicas = _section(cfg, "parallel").get("dp_replicate", 1)
    if processes % replicas:
        said = f"processes must be a multiple of parallel.dp_replicate={replicas}, got {processes}; give --nproc N"
        yield Finding("dp_replicate", said, wrong=True)
    ends = [n for n in ((run.get("epochs") or 0) * per_epoch, run.get("max_steps") or 0) if n]
    total = f", {min(ends):,} in all" if ends else ""
    held = f"in {processes:,} processes" if processes > 1 else "in one process"
    yield Finding("steps", f"{per_epoch:,} of {run['batch_size']:,} pairs an epoch{total}, {held}")
    yield check_epoch(data, run["batch_size"])
    warmup = _section(cfg, "schedule").get("warmup_steps", 0)
    if ends and warmup >= min(ends):
        said = f"warmup takes {warmup:,} steps, and the whole run {min(ends):,}; lower schedule.warmup_steps"
        yield Finding("schedule", said, wrong=True)
    if not contrasted:
        return
    size_of_negatives = run["batch_size" if cfg.loss["negatives"] == "global" else "micro_batch_size"]
    if met := check_false_negatives(data, size_of_negatives, run.get("seed", 0)):
        yield met
    planned = RunPlan(
        Path(run["folder"]),
        run["batch_size"],
        run["micro_batch_size"],
        processes,
        min(ends, default=per_epoch),
        _section(cfg, "saving")["keep"],
        replicas,
        loader["workers"],
        cfg.optimizer,
        cfg.loss,
    )

    def build() -> nn.Module:
        if source is None:
            return cfg.build("model")
        model = build_pretrained(source, dropout=cfg.model["dropout"])
        freeze(model, run["freeze"])
        return model

    yield from run_cost(planned, build, data.pairs, tokenizer, image_size=size, crop=loader["crop"])
