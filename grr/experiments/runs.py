"""What the folder of a run says: its numbers, and the conditions under which they were measured."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from grr.checkpoint.identity import HOW_COMPUTED
from grr.training.log import LogLine, is_number, kept_step, read_metrics, read_starts

# What may differ between runs that are compared: the model, what a fingerprint stands for, and how a run is computed.
FREE_SECTIONS = ("model", "data", "validation")
FREE = HOW_COMPUTED | {"run.seed", "saving.accept_changes", "tokenizer.path", "tokenizer.vocab_size"}
FACTS = ("data", "validation", "tokenizer", "batch_size")  # of the manifest: fingerprints, and the global batch


@dataclass
class RunRecord:
    """One run, read."""

    folder: Path
    seed: int
    finished: bool
    model: dict[str, Any]  # name and arguments of its builder
    conditions: dict[str, Any]  # by name: all that must be equal if only the model shall make a difference
    start: dict[str, Any]  # the manifest's last
    validations: list[LogLine]  # lines of metrics.jsonl
    final: LogLine | None  # its line on the model that a fine-tuning left; None for other runs
    evaluation: dict[str, Any]  # evaluation.json; empty if there is none

    @property
    def best(self) -> LogLine:
        """The line that a run counts by: of the model that was left, or else the validation with the lowest loss; of a
        classifier, the one with the highest accuracy, whose weights it keeps."""
        finite = [row for row in self.validations if is_number(row.get("loss"))]
        return self.final or min(finite, key=lambda row: float(-row["accuracy"] if "accuracy" in row else row["loss"]))

    @property
    def best_step(self) -> int:
        """The step whose weights those are."""
        step = kept_step(self.best)
        return int(self.best["step"]) if step is None else step


def read_run(folder: Path) -> RunRecord:
    """Read config.yaml, manifest.json, metrics.jsonl and, if there is one, evaluation.json.

    Raises ValueError if the folder is not that of a run that was validated.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"read_run: {folder} is not the folder of a run, it has no config.yaml")
    config: Any = OmegaConf.to_container(OmegaConf.load(file))
    starts, description = read_starts(folder), _json(folder / "model" / "config.json")
    if not starts:
        raise ValueError(f"read_run: {folder / 'manifest.json'} is missing or damaged")
    model = {"name": description["builder"], **description["arguments"]} if description else dict(config["model"])
    model.pop("path", None)
    evaluation = _json(folder / "evaluation.json")
    rows = read_metrics(folder)
    run = RunRecord(
        folder=folder,
        seed=config["run"]["seed"],
        finished=bool(description),
        model=model,
        conditions={**_conditions(config, starts[-1]), **_judged(evaluation)},
        start=starts[-1],
        validations=[row for row in rows if row.get("split") == "validation"],
        final=next((row for row in reversed(rows) if row.get("split") == "final"), None),
        evaluation=evaluation,
    )
    if not any(is_number(row.get("loss")) for row in run.validations):
        raise ValueError(f"read_run: {folder} has no validation yet; a run is compared by the lowest of its losses")
    return run


def read_models(models: Sequence[str]) -> dict[str, list[RunRecord]]:
    """The runs of each model, by seed. models: "name: folders", where folders may hold the wildcards * ? [].

    Raises ValueError if an entry has no name, a name stands there twice, nothing matches, a folder is no run, or two
    runs of a model have one seed.
    """
    result: dict[str, list[RunRecord]] = {}
    for entry in models:
        name, colon, pattern = (part.strip() for part in entry.partition(":"))
        if not (name and colon and pattern) or name in result:
            raise ValueError(f'read_models: each model must be "name: folders", with a name of its own, got {entry!r}')
        place = Path(pattern)
        folders = sorted(p for p in Path(place.anchor).glob(str(place.relative_to(place.anchor))) if p.is_dir())
        if not folders:
            raise ValueError(f"read_models: no folder matches {pattern} ({name}), seen from {Path.cwd()}")
        runs = sorted((read_run(folder) for folder in folders), key=lambda run: run.seed)
        for one, other in itertools.pairwise(runs):
            if one.seed == other.seed:
                raise ValueError(
                    f"read_models: {one.folder} and {other.folder} ({name}) both have the seed "
                    f"{one.seed}; name the folders of one model more closely"
                )
        result[name] = runs
    return result


def differences(models: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """All in which some runs differ beside their models, a line for each run and key, with both values.

    Every run is held against the first; its model, against the first of its own. Runs that are not finished, and
    evaluations that some runs have and others not, count as differences.
    """
    lines = []
    reference = next(run for runs in models.values() for run in runs)
    for runs in models.values():
        for run in runs:
            if not run.finished:
                lines.append(f"{run.folder}: is not finished, it has no model/ yet")
            lines += _unequal(run, run.conditions, reference, reference.conditions)
            lines += _unequal(run, _named("model", run.model), runs[0], _named("model", runs[0].model))
    return lines


def _unequal(run: RunRecord, values: Mapping[str, Any], other: RunRecord, others: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(values.keys() | others.keys()):
        ours, theirs = (_spelled(key, side) for side in (values, others))
        if ours != theirs:
            yield f"{run.folder}: {key} is {ours}, in {other.folder} it is {theirs}"


def _spelled(key: str, values: Mapping[str, Any]) -> str:
    return json.dumps(values[key]) if key in values else "not there"


def _conditions(config: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """How and on what a model is trained and measured; of a fine-tuning, what it starts from as well.

    The size of a micro-batch is free unless micro-batches are contrasted each in itself.
    """
    free = FREE - {"run.micro_batch_size"} if config.get("loss", {}).get("negatives") == "local" else FREE
    sections = {name: values for name, values in config.items() if name not in FREE_SECTIONS}
    told = {key: value for name, values in sections.items() for key, value in _named(name, values).items()}
    conditions = {key: value for key, value in told.items() if key not in free}
    return {**conditions, **{key: start.get(key) for key in FACTS}, **_pre_training(config["model"].get("path"))}


def _pre_training(path: str | None) -> dict[str, Any]:
    """The conditions of the run that a fine-tuning starts from: path is its folder, its model/ or a checkpoint in it.

    Nothing where that run is no longer there.
    """
    for folder in (Path(path), *Path(path).parents[:2]) if path else ():
        file = folder / "config.yaml"
        if file.is_file() and (starts := read_starts(folder)):
            config: Any = OmegaConf.to_container(OmegaConf.load(file))
            return _named("pre-training", _conditions(config, starts[-1]))
    return {}


def _judged(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Of what an evaluation was made."""
    prints = {f"evaluation.{name}": (evaluation.get(name) or {}).get("fingerprint") for name in ("data", "labelled")}
    images = {"evaluation.images": (evaluation.get("data") or {}).get("images")}
    return {
        **prints,
        **images,
        "evaluation.generation": evaluation.get("generation"),
        "evaluation.precision": (evaluation.get("model") or {}).get("precision"),
        "evaluation.tasks": sorted(evaluation.get("results", {})),
    }


def _named(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in values.items()}


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none. Raises ValueError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"read_run: {file} is damaged ({error})") from None
