"""Records of finished runs: their metrics, and the conditions under which they were measured."""

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from grr.checkpoint.identity import HOW_COMPUTED
from grr.config.renamed import ADDED, current_keys
from grr.training.log import LogLine, is_number, kept_step, read_metrics, read_starts

# These may differ between compared runs: the model, sections that a fingerprint represents, and how a run is computed.
FREE_SECTIONS = ("model", "data", "validation")
FREE = HOW_COMPUTED | {"run.seed", "saving.accept_changes", "tokenizer.path", "tokenizer.vocab_size"}
SETTINGS = ("contrastive_batch", "contrastive_weight", "captioning_weight")  # of the losses of an evaluation
FACTS = ("data", "validation", "tokenizer", "batch_size")  # of the manifest: fingerprints, and the global batch


@dataclass
class RunRecord:
    """Record of one run."""

    folder: Path
    seed: int
    finished: bool
    model: dict[str, Any]  # name and arguments of its builder
    conditions: dict[str, Any]  # by name: must be equal in all runs, so that only the model differs
    start: dict[str, Any]  # last entry of the manifest
    validations: list[LogLine]  # lines of metrics.jsonl
    final: LogLine | None  # line of metrics.jsonl on the model that fine-tuning saved; None for other runs
    evaluation: dict[str, Any]  # evaluation.json; empty without one

    @property
    def best(self) -> LogLine:
        """Line of the metrics that represents the run: that of the saved model, or else of the validation with the
        lowest loss; for a classifier, of the highest accuracy, whose weights are saved."""
        finite = [row for row in self.validations if is_number(row.get("loss"))]
        return self.final or min(finite, key=lambda row: float(-row["accuracy"] if "accuracy" in row else row["loss"]))

    @property
    def best_step(self) -> int:
        """Step of the weights of `best`."""
        step = kept_step(self.best)
        return int(self.best["step"]) if step is None else step


def read_run(folder: Path) -> RunRecord:
    """Read config.yaml, manifest.json, metrics.jsonl and, if it exists, evaluation.json of a run.

    Raises ValueError if the folder does not hold a run with a validation.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"read_run: the folder of a run must hold config.yaml, got {folder}; check the path")
    config: Any = OmegaConf.to_container(OmegaConf.load(file))
    starts, description = read_starts(folder), _json(folder / "model" / "config.json")
    if not starts:
        raise ValueError(
            f"read_run: {folder / 'manifest.json'} is missing or damaged; restore it, or train the model again"
        )
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
        raise ValueError(
            f"read_run: a run must have a validation to be compared, got {folder} without one; continue the run"
        )
    return run


def read_models(models: Sequence[str]) -> dict[str, list[RunRecord]]:
    """Read the runs of each model, sorted by seed. models: "name: folders", where folders may have wildcards * ? [].

    Raises ValueError if an entry has no name, a name occurs twice, no folder matches, a folder does not hold a run, or
    two runs of a model have the same seed.
    """
    result = read_groups(models)
    for name, runs in result.items():
        for one, other in itertools.pairwise(runs):
            if one.seed == other.seed:
                raise ValueError(
                    f"read_models: {one.folder} and {other.folder} ({name}) both have the seed "
                    f"{one.seed}; narrow the pattern to the folders of one model"
                )
    return result


def read_groups(groups: Sequence[str]) -> dict[str, list[RunRecord]]:
    """Read the runs of each group, sorted by seed, which may be of several models. groups: as in `read_models`.

    Raises ValueError as it does, except for equal seeds.
    """
    result: dict[str, list[RunRecord]] = {}
    for entry in groups:
        name, colon, pattern = (part.strip() for part in entry.partition(":"))
        if not (name and colon and pattern) or name in result:
            raise ValueError(f'read_models: each model must be "name: folders" with a unique name, got {entry!r}')
        place = Path(pattern)
        folders = sorted(p for p in Path(place.anchor).glob(str(place.relative_to(place.anchor))) if p.is_dir())
        if not folders:
            raise ValueError(f"read_models: no folder matches {pattern} ({name}) in {Path.cwd()}; check run.models")
        result[name] = sorted((read_run(folder) for folder in folders), key=lambda run: run.seed)
    return result


def differences(models: Mapping[str, Sequence[RunRecord]], of_model: Collection[str] = ()) -> list[str]:
    """Returns the conditions, other than the model, in which runs differ: a line per run and key, with both values.

    Every run is held against the first; its model, and the conditions in of_model, against the first of its own. Runs
    that are not finished, and evaluations that some runs have and others not, count as differences.
    """
    lines = []
    reference = next(run for runs in models.values() for run in runs)
    for runs in models.values():
        for run in runs:
            if not run.finished:
                lines.append(f"{run.folder}: is not finished, because it does not have model/")
            own, every = _split(run, of_model)
            lines += _unequal(run, every, reference, _split(reference, of_model)[1])
            lines += _unequal(run, own, runs[0], _split(runs[0], of_model)[0])
    return lines


def _split(run: RunRecord, of_model: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the conditions that belong to the model of a run, and those that all runs should share."""
    own = {key: value for key, value in run.conditions.items() if key in of_model}
    model = current_keys(_named("model", run.model), [key for key in ADDED if key.startswith("model.")])
    return {**own, **model}, {k: v for k, v in run.conditions.items() if k not in of_model}


def _unequal(run: RunRecord, values: Mapping[str, Any], other: RunRecord, others: Mapping[str, Any]) -> Iterator[str]:
    keys = values.keys() | others.keys()
    if values.get("evaluation.json") != others.get("evaluation.json"):  # then one of them has no conditions of it
        keys = {key for key in keys if key == "evaluation.json" or not key.startswith("evaluation.")}
    for key in sorted(keys):
        ours, theirs = (_shown(key, side) for side in (values, others))
        if ours != theirs:
            yield f"{run.folder}: {key} is {ours}, in {other.folder} it is {theirs}"


def _shown(key: str, values: Mapping[str, Any]) -> str:
    return json.dumps(values[key]) if key in values else "not set"


def _conditions(config: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the conditions of training and validation, and of pre-training if the run is a fine-tuning.

    The size of a micro-batch may differ, except with local negatives.
    """
    free = FREE - {"run.micro_batch_size"} if config.get("loss", {}).get("negatives") == "local" else FREE
    flat = {key: value for name, values in config.items() for key, value in _named(name, values).items()}
    current = current_keys(flat, ADDED)  # the run of an older version may be compared with one of today's
    conditions = {
        key: value for key, value in current.items() if key not in free and key.partition(".")[0] not in FREE_SECTIONS
    }
    return {**conditions, **{key: start.get(key) for key in FACTS}, **_pre_training(config["model"].get("path"))}


def _pre_training(path: str | None) -> dict[str, Any]:
    """Returns the conditions of the run that a fine-tuning starts from; path: its folder, its model/ or a checkpoint.

    Empty if that run no longer exists.
    """
    for folder in (Path(path), *Path(path).parents[:2]) if path else ():
        file = folder / "config.yaml"
        if file.is_file() and (starts := read_starts(folder)):
            config: Any = OmegaConf.to_container(OmegaConf.load(file))
            return _named("pre-training", _conditions(config, starts[-1]))
    return {}


def _judged(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the conditions of an evaluation; of a run without one, that it has none."""
    if not evaluation:
        return {"evaluation.json": "missing"}
    results = evaluation.get("results", {})
    prints = {
        f"evaluation.{name}": (evaluation.get(name) or {}).get("fingerprint")
        for name in ("data", "labelled", "choices")
    }
    images = {"evaluation.images": (evaluation.get("data") or {}).get("images")}
    return {
        "evaluation.json": "there",
        **prints,
        **images,
        "evaluation.generation": evaluation.get("generation"),
        "evaluation.judge": (results.get("clip_score") or {}).get("judge_fingerprint"),
        "evaluation.precision": (evaluation.get("model") or {}).get("precision"),
        "evaluation.tasks": sorted(results),
        **{f"evaluation.losses.{key}": (results.get("losses") or {}).get(key) for key in SETTINGS},
    }


def _named(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in values.items()}


def _json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, empty if the file does not exist. Raises ValueError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"read_run: {file} is damaged ({error}); restore it, or write it again") from None
