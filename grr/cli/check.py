"""Check a config before a run: what its recipe would refuse, and the data that it names."""

import dataclasses
import importlib.util
import inspect
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from grr import config
from grr.config.signature import arguments_of
from grr.data import Labelled, Pairs, check_classes, steps_per_epoch, training_steps, validation_steps
from grr.data.images import Crop
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
from grr.experiments import catalog
from grr.experiments.sweep import plan
from grr.inference.pretrained import Pretrained, build_pretrained, find_pretrained
from grr.inference.towers import open_tower
from grr.models.tuning import check_adapter_dropout
from grr.seeds import derive_seed
from grr.tokenizers import Tokenizer, load_tokenizer, open_tokenizer
from grr.training.cost import RunPlan, run_cost
from grr.training.schedule import warmup_cosine
from grr.training.step import global_batch_step

HELD_OUT = {"validation": "data", "labelled": "labelled_train"}  # sections, and those that may share no image with them
SIZE = 224  # of images, if neither the config nor a model sets it


def read_config(file: Path, overrides: Sequence[str], recipe: Path) -> tuple[config.Config, config.Sections]:
    """Returns a config as its recipe reads it, and the functions of its sections.

    Raises ConfigError with all mistakes, ValueError if the recipe has no SECTIONS, and what the recipe's function
    `validate_config` raises, if it has one.
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
    """Open all that a config names, and read a sample of its images and captions, or with `every` all of them.

    processes: of the run, on all machines; batches must be divisible among them. Only the index of tar shards is
    written. What cannot be opened is a finding. Raises ValueError if processes is below 1.
    """
    if processes < 1:
        raise ValueError(f"check: a run has at least one process, got {processes=}")
    for section, function in sections.items():
        if dataclasses.is_dataclass(function):  # options that may exclude each other
            try:
                cfg.build(section)
            except ValueError as error:
                yield _mistake(section, error)
    if {"stages", "variants", "seeds", "overrides"} <= _section(cfg, "run").keys():
        yield from _check_sweep(cfg.run)

    # data
    opened: dict[str, Data] = {}
    for section in data_sections(cfg, sections):
        try:
            opened[section] = Data(section, cfg.build(section))
        except (ValueError, OSError, ImportError) as error:
            yield _mistake(section, error)

    # model and tokenizer
    source, tokenizer, long = None, None, None
    try:
        source = _pretrained(cfg)
    except (ValueError, OSError) as error:
        yield _mistake("model", error)
    try:
        tokenizer, long = _tokenizers(cfg, sections, source, opened.get("data"))
    except (ValueError, OSError, ImportError) as error:
        yield _mistake("tokenizer", error)
    if tokenizer is not None:
        yield Finding("tokenizer", f"{tokenizer.vocab_size:,} ids, {tokenizer.context_length} tokens at a time")
    if source is not None:
        yield Finding("model", f"{source.builder} from {source}")
    elif "path" not in _section(cfg, "model") and "model" in sections:
        yield from _check_new_model(cfg, sections["model"], tokenizer)

    # images and captions, then the steps of training
    size = source.arguments["image_size"] if source else _section(cfg, "model").get("image_size", SIZE)
    crop = _section(cfg, "loader").get("crop") or (source.crop if source else "squash")
    if "crop" in _section(cfg, "loader"):
        cfg.loader["crop"] = crop
    yield from _check_data(cfg, sections, opened, tokenizer, long, size=size, crop=crop, every=every)
    if "data" in opened and tokenizer is not None:
        yield from _check_steps(cfg, sections, opened, tokenizer, source, size, processes)


def _check_data(
    cfg: config.Config,
    sections: config.Sections,
    opened: Mapping[str, Data],
    tokenizer: Tokenizer | None,
    long: Tokenizer | None,
    *,
    size: int,
    crop: Crop,
    every: bool,
) -> Iterator[Finding]:
    """Check the records, images and captions of each section, and what training and held-out data share."""
    pixels: dict[str, set[bytes]] = {}
    for section, data in opened.items():
        arguments = _section(cfg, section)
        yield Finding(section, ", ".join(f"{key}={value}" for key, value in arguments.items() if value is not None))
        findings = [*check_records(data, every=every), *check_counts(data), *check_captions(data)]
        if tokenizer is not None and long is not None:
            findings += check_tokens(data, long, tokenizer.context_length, every=every)
        pixels[section], of_images = check_images(data, size=size, crop=crop, every=every)
        findings += of_images
        if isinstance(data.source, ImageFiles):
            findings += check_unused_images(data.source, _splits(sections[section], arguments, data.source))
        yield from (finding._replace(what=f"  {finding.what}") for finding in findings)
    for held_out, train in HELD_OUT.items():
        if held_out in opened and train in opened:
            equal = len(pixels[held_out] & pixels[train])
            yield from check_overlap(opened[held_out], opened[train], equal, every=every)
            yield from _check_equal_classes(opened[train].pairs, opened[held_out].pairs, held_out)


@cache
def _module(file: Path) -> ModuleType:
    """Returns a recipe's file as a module, in any folder. It may import files beside it; its main is not called."""
    if not file.is_file():
        raise FileNotFoundError(f"check: there is no recipe {file}")
    name = f"grr_recipe_{file.stem}_{derive_seed(str(file.resolve()))}"  # recipes in several folders may have one name
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses resolve their types in it
    sys.path.insert(0, str(file.absolute().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def data_sections(cfg: config.Config, sections: config.Sections) -> list[str]:
    """Returns the sections of a config that read data."""
    return [section for section, function in sections.items() if _returns(Pairs, cfg, function, section)]


def _accept(cfg: config.Config) -> None: ...


def _section(cfg: config.Config, section: str) -> dict[str, Any]:
    """Returns the arguments of a section; none if the recipe has no such section."""
    return vars(cfg).get(section, {})


def _mistake(what: str, error: Exception) -> Finding:
    return Finding(what, " ".join(str(error).split()), wrong=True)


def _returns(kind: type, cfg: config.Config, function: config.Section, section: str) -> bool:
    """Returns whether the function that a section chose makes such a thing, by its annotation, of its options alone."""
    if isinstance(function, Mapping):
        function = function[_section(cfg, section)["name"]]
    if arguments_of(function)[1]:  # such as `augmented`, which changes pairs that it gets
        return False
    result = None if inspect.isclass(function) else inspect.signature(function, eval_str=True).return_annotation
    return inspect.isclass(result) and issubclass(result, kind)


def _pretrained(cfg: config.Config) -> Pretrained | None:
    """Returns the trained model that a config names, or None."""
    path = _section(cfg, "model").get("path")
    return None if path is None else find_pretrained(path)


def _tokenizers(
    cfg: config.Config, sections: config.Sections, source: Pretrained | None, train: Data | None
) -> tuple[Tokenizer | None, Tokenizer | None]:
    """Returns the run's tokenizer, and one of the same vocabulary with four times its context length."""
    if source is not None:
        file, context_length = source.tokenizer, source.arguments["context_length"]
        lengths = context_length, 4 * context_length
        return load_tokenizer(file, context_length=lengths[0]), load_tokenizer(file, context_length=lengths[1])
    if "tokenizer" not in sections or train is None:
        return None, None
    captions = [train.pairs.captions[i] for i in sample_numbers(len(train.pairs), MAX_CAPTIONS)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = open_tokenizer(captions, Path(folder, "tokenizer.model"), **cfg.tokenizer)
        return tokenizer, load_tokenizer(Path(folder, "tokenizer.model"), context_length=4 * tokenizer.context_length)


def _check_new_model(cfg: config.Config, function: config.Section, tokenizer: Tokenizer | None) -> Iterator[Finding]:
    """Build the model without memory, which finds sizes that do not fit each other."""
    if not _returns(nn.Module, cfg, function, "model"):
        return
    try:
        tower = open_tower(cfg.model, Path(_section(cfg, "run").get("folder", "")))
    except (ValueError, OSError, ImportError) as error:
        yield _mistake("model", error)
        return
    if tower is not None:
        cfg.model |= {"vision_config": tower.description}
        cfg.model["image_size"] = cfg.model["image_size"] or tower.description["image_size"]
        cfg.loader["crop"] = cfg.loader["crop"] or tower.description["crop"]
    if tokenizer is not None:
        cfg.model |= {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
    try:
        with torch.device("meta"):
            model = cfg.build("model")
        yield Finding("model", f"{cfg.model['name']}, {sum(p.numel() for p in model.parameters()):,} parameters")
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        yield _mistake("model", error)


def _splits(function: config.Section, arguments: dict[str, Any], own: ImageFiles) -> Iterator[ImageFiles]:
    """Yield the same data in each of its splits."""
    if "split" not in arguments or not isinstance(function, Mapping):
        return
    others = {key: value for key, value in arguments.items() if key != "name"}
    for split in ("train", "validation", "test"):
        logging.disable(logging.WARNING)  # what was skipped is already a finding of the first split
        try:
            pairs = function[arguments["name"]](**others | {"split": split})
        except (ValueError, OSError):  # there is no such split
            continue
        finally:
            logging.disable(logging.NOTSET)
        if isinstance(pairs, ImageFiles) and pairs.root == own.root:
            yield pairs


def _check_equal_classes(train: Pairs, held_out: Pairs, section: str) -> Iterator[Finding]:
    if isinstance(train, Labelled) and isinstance(held_out, Labelled):
        try:
            check_classes(train, held_out)
        except ValueError as error:
            yield _mistake(section, error)


def _check_sweep(sweep: dict[str, Any]) -> Iterator[Finding]:
    """Check the config of every run of a sweep with its first seed."""
    folder, seeds = Path(sweep["folder"]), sweep["seeds"]
    try:
        jobs = plan(folder, sweep["stages"], sweep["variants"], seeds, sweep["overrides"])
    except ValueError as error:
        yield _mistake("run", error)
        return
    mistakes: dict[str, None] = {}  # each once, though several runs may have it
    for job in (job for job in jobs if job.seed == seeds[0]):
        try:
            command = job.command()
            recipe = Path(command[catalog.recipe_place(command)])
            if not catalog.is_own(recipe):
                mistakes[f"{recipe}: a recipe that only a config names is not imported by a check"] = None
            elif "--config" in command:
                file = Path(command[command.index("--config") + 1])
                read_config(file, [word for word in command if config.OVERRIDE.match(word)], recipe)
        except ValueError as error:
            mistakes[f"{job.name}: {' '.join(str(error).split())}"] = None
    for line in mistakes:
        yield Finding("runs", line, wrong=True)
    if not mistakes:
        yield Finding("runs", f"{len(jobs):,}, in {len(sweep['stages'])} stages; their configs have no mistake")


def _check_steps(
    cfg: config.Config,
    sections: config.Sections,
    opened: Mapping[str, Data],
    tokenizer: Tokenizer,
    source: Pretrained | None,
    size: int,
    processes: int,
) -> Iterator[Finding]:
    """Check the optimizer steps of a training run: batches among processes, the schedule, negatives, and the cost."""
    run, loader, data = _section(cfg, "run"), _section(cfg, "loader"), opened["data"]
    if not loader or not {"batch_size", "micro_batch_size"} <= run.keys():
        return
    is_contrastive = sections.get("loss") is global_batch_step
    try:
        _build_steps(cfg, sections, opened, tokenizer, size, processes)
        per_epoch = steps_per_epoch(data.pairs, run["batch_size"])
        if sections.get("schedule") is warmup_cosine:
            warmup_cosine(0, per_epoch, cfg.optimizer["lr"], **cfg.schedule)
    except ValueError as error:
        yield _mistake("steps", error)
        return
    replicas = _section(cfg, "parallel").get("dp_replicate", 1)
    if processes % replicas:
        rule = f"processes must be a multiple of parallel.dp_replicate={replicas}, got {processes}; give --nproc N"
        yield Finding("dp_replicate", rule, wrong=True)
    ends = [n for n in ((run.get("epochs") or 0) * per_epoch, run.get("max_steps") or 0) if n]
    total = f", {min(ends):,} in all" if ends else ""
    where = f"in {processes:,} processes" if processes > 1 else "in one process"
    yield Finding("steps", f"{per_epoch:,} of {run['batch_size']:,} pairs an epoch{total}, {where}")
    yield check_epoch(data, run["batch_size"])
    warmup = _section(cfg, "schedule").get("warmup_steps", 0)
    if ends and warmup >= min(ends):
        rule = f"warmup takes {warmup:,} steps, and the whole run {min(ends):,}; lower schedule.warmup_steps"
        yield Finding("schedule", rule, wrong=True)
    if not is_contrastive:
        return
    num_negatives = run["batch_size" if cfg.loss["negatives"] == "global" else "micro_batch_size"]
    if false_negatives := check_false_negatives(data, num_negatives, run.get("seed", 0)):
        yield false_negatives
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
    build = partial(_build_model, cfg, source)
    yield from run_cost(planned, build, data.pairs, tokenizer, image_size=size, crop=loader["crop"])


def _build_steps(
    cfg: config.Config,
    sections: config.Sections,
    opened: Mapping[str, Data],
    tokenizer: Tokenizer,
    size: int,
    processes: int,
) -> None:
    """Raises ValueError if the batches do not fit the data, the processes or the contrastive loss."""
    run = cfg.run
    micro = run["micro_batch_size"] or max(1, run["batch_size"] // processes)
    batches = {
        "rank": 0,
        "world": processes,
        "batch_size": run["batch_size"],
        "image_size": size,
        "micro_batch_size": micro,
        "pin_memory": False,
        **cfg.loader,
    }
    training_steps(opened["data"].pairs, tokenizer, seed=0, start_step=0, **batches)
    if "validation" in opened:
        validation_steps(opened["validation"].pairs, tokenizer, **batches)
    if sections.get("loss") is global_batch_step:
        check_negatives(run["batch_size"], run["micro_batch_size"], cfg.loss["negatives"])
    tuning = _section(cfg, "tuning")
    check_adapter_dropout(tuning.get("lora", ()), tuning.get("dropout", 0.0), run["micro_batch_size"])


def _build_model(cfg: config.Config, source: Pretrained | None) -> nn.Module:
    if source is None:
        return cfg.build("model")
    model = build_pretrained(source, dropout=cfg.model["dropout"])
    cfg.build("tuning", model)
    return model
