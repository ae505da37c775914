"""Evaluate a trained model: losses, retrieval, captions, classes, composition.

    python recipes/evaluate.py --config recipes/configs/evaluate/openmoji.yaml model.path=runs/openmoji
    torchrun --nproc_per_node 4 recipes/evaluate.py --config recipes/configs/evaluate/coco.yaml

Writes evaluation.json and evaluation.html. The result does not depend on the number of processes; on CPUs it is equal
bit for bit if OMP_NUM_THREADS is the same. Any key of the config may follow as key=value.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grr import config  # before torch: grr sets how its threads wait

# isort: split
import torch
import torch.distributed as dist

from grr.checkpoint.training_state import read_progress
from grr.cli.program import run_main
from grr.data import CHOICES, DATASETS, LABELLED, Choices, Labelled, Pairs, check_classes
from grr.evaluation.captions import treebank
from grr.evaluation.composition import check_spatial, choice_accuracy, count_ties, relation_accuracy
from grr.evaluation.evaluate import caption_scores, losses, recalls
from grr.evaluation.examples import examples
from grr.evaluation.metrics.clip_score import judged_captions
from grr.evaluation.metrics.meteor import meteor, open_wordnet
from grr.evaluation.outputs import Features, ModelOutputs, compute_outputs, features
from grr.evaluation.probe import attentive_probe, linear_probe
from grr.evaluation.zero_shot import accuracy, class_embeddings
from grr.generation.generate import generate
from grr.inference.captioner import Captioner
from grr.inference.hub import split_name
from grr.inference.pretrained import Pretrained, find_pretrained, fingerprint, load_pretrained
from grr.models.coca import CoCa
from grr.parallel.process_group import process_group
from grr.reports.evaluation import Confusions, as_text, write_evaluation
from grr.tokenizers import Tokenizer

Task = Literal[
    "losses",
    "retrieval",
    "captions",
    "meteor",
    "clip_score",
    "relations",
    "zero_shot",
    "linear_probe",
    "attentive_probe",
    "choices",
]
GENERATED: tuple[Task, ...] = ("captions", "meteor", "clip_score", "relations")  # tasks that need generated captions
PAIRED: tuple[Task, ...] = ("losses", "retrieval", *GENERATED)  # tasks that need images with captions
PROBES: tuple[Task, ...] = (
    "linear_probe",
    "attentive_probe",
)  # need images to train on as well


@dataclass
class Run:
    """Options of the recipe."""

    folder: str | None = None  # where results are written; null: that of the model's run, or evaluations/
    tasks: list[Task] = field(default_factory=lambda: ["losses", "retrieval", "captions"])
    images: int | None = None  # use the first so many, with their captions; null: all
    bf16: bool = False  # compute in bfloat16


@dataclass
class Model:
    """Trained model."""

    path: str  # a run's folder, its model/, one of its checkpoints/step_N, or hf-hub:owner/name


@dataclass
class Judge:
    """Model whose embeddings judge generated captions, for the task clip_score."""

    path: str | None = None  # as model.path; that path itself is allowed, and flatters the model


SECTIONS: config.Sections = {
    "run": Run,
    "model": Model,
    "judge": Judge,
    "data": DATASETS | config.NONE,
    "losses": losses,
    "generation": generate,
    "labelled": LABELLED | config.NONE,
    "labelled_train": LABELLED | config.NONE,
    "choices": CHOICES | config.NONE,
    "zero_shot": class_embeddings,
    "linear_probe": linear_probe,
    "attentive_probe": attentive_probe,
}


def main() -> None:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    validate_config(cfg)
    with process_group() as device:
        # model: whole in every process, because each computes other batches
        source = find_pretrained(cfg.model["path"])
        dtype = torch.bfloat16 if run.bf16 else torch.float32
        trained = load_pretrained(source, device=device, dtype=dtype)
        model, tokenizer, image_size, crop = trained
        logging.info(f"evaluating {source}: {', '.join(run.tasks)}")

        # outputs: all processes share the images, and rank 0 gets the outputs
        images: dict[str, Any] = {"image_size": image_size, "crop": crop, "progress": True}
        outputs = judged = compared = test = train = classes = None
        choices: Choices | None = cfg.build("choices") if "choices" in run.tasks else None
        labelled: Labelled | None = cfg.build("labelled") if set(run.tasks) & {"zero_shot", *PROBES} else None
        # zero-shot first, because invalid names must not cost hours of images
        if labelled is not None and "zero_shot" in run.tasks:
            classes = class_embeddings(model, tokenizer, labelled.classes, device, **cfg.zero_shot)  # [c, e]
        if any(task in PAIRED for task in run.tasks):
            options: dict[str, Any] = {"images": run.images, "generation": generation_of(cfg)}
            pairs = cfg.build("data")
            if "relations" in run.tasks:
                check_spatial(pairs.captions)
            outputs = compute_outputs(model, pairs, tokenizer, device, **options, **images)
            if "clip_score" in run.tasks:
                judged = judge_captions(cfg.judge["path"], trained, pairs, outputs, device)
        if choices is not None:
            if (ties := count_ties(choices, tokenizer)) and dist.get_rank() == 0:
                logging.warning(
                    f"choices: in {ties:,} of {len(set(choices.questions.tolist())):,} questions both captions are the "
                    f"same {tokenizer.context_length} tokens, which counts as a wrong answer"
                )
            compared = compute_outputs(model, choices, tokenizer, device, images=run.images, **images)
        if labelled is not None:
            patches = "attentive_probe" in run.tasks
            test = features(model, labelled, device, patches=patches, **images)
            if any(task in PROBES for task in run.tasks):
                labelled_train = cfg.build("labelled_train")
                check_classes(labelled_train, labelled)
                train = features(model, labelled_train, device, patches=patches, **images)
        if dist.get_rank() > 0:
            return

        # metrics: computed by rank 0
        results: dict[str, Any] = {}
        confusions = None
        if outputs is not None:
            results |= pair_metrics(cfg, outputs, tokenizer)
        if judged is not None:
            results["clip_score"] = judged
        if compared is not None and choices is not None:
            results["choices"] = choice_accuracy(compared, choices)
        if test is not None and classes is not None:
            scores = test.embeddings @ classes.float().cpu().T  # [n, c]
            results["zero_shot"] = accuracy(scores, test.labels)
            confusions = Confusions.of(test.labelled.classes, scores, test.labels)
        if test is not None and train is not None:
            results |= probe_metrics(cfg, train, test, model.pooler_heads, device)

        # write
        evaluation = {
            "model": model_facts(source, model, dtype),
            "data": {**cfg.data, **outputs.facts()} if outputs else None,
            "labelled": {**cfg.labelled, **test.facts()} if test else None,
            "labelled_train": {**cfg.labelled_train, **train.facts()} if train else None,
            "choices": {**cfg.choices, **compared.facts()} if compared else None,
            "generation": generation_of(cfg),
            "results": results,
        }
        folder = Path(run.folder) if run.folder else run_of(source)
        page = write_evaluation(
            folder, evaluation, examples(outputs, model, tokenizer) if outputs else None, confusions
        )
        print(as_text(evaluation))
        logging.info(f"see {page}, and evaluation.json beside it")


def validate_config(cfg: config.Config) -> None:
    """Check that each task has its data (ValueError and FileNotFoundError otherwise) and its packages (ImportError)."""
    if cfg.run["images"] is not None and cfg.run["images"] < 1:
        raise ValueError(f"evaluate: run.images must be at least 1, or null for all, got {cfg.run['images']}")
    needs = {"data": PAIRED, "labelled": ("zero_shot", *PROBES), "labelled_train": PROBES, "choices": ("choices",)}
    for section, wanted in needs.items():
        for task in cfg.run["tasks"]:
            if task in wanted and vars(cfg)[section]["name"] == "none":
                raise ValueError(
                    f"evaluate: the task {task} needs the section {section}, got none; add it to the config, or remove "
                    f"{task} from run.tasks"
                )
    if "clip_score" in cfg.run["tasks"] and cfg.judge["path"] is None:
        raise ValueError(
            "evaluate: the task clip_score needs a model that judges, got judge.path=null; set judge.path to a run, a "
            "model/ or hf-hub:owner/name, or remove clip_score from run.tasks"
        )
    if "clip_score" in cfg.run["tasks"]:
        try:
            find_pretrained(cfg.judge["path"])
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"evaluate: judge.path must name a model: {error}") from error
    if "captions" in cfg.run["tasks"]:
        treebank()
    if "meteor" in cfg.run["tasks"]:
        open_wordnet()


def generation_of(cfg: config.Config) -> dict[str, Any] | None:
    """Returns the options of `generate`, None if no captions are generated."""
    return cfg.generation if set(GENERATED) & set(cfg.run["tasks"]) else None


def judge_captions(
    path: str, trained: Captioner, pairs: Pairs, outputs: ModelOutputs | None, device: torch.device
) -> dict[str, Any]:
    """Compute CLIPScores of generated captions by another model, in float32; all processes share the images."""
    source = find_pretrained(path)
    judge = load_pretrained(source, device=device)
    prints = [fingerprint(judge), fingerprint(trained)]
    if prints[0] == prints[1] and dist.get_rank() == 0:
        logging.warning(f"clip_score: the judge {source} is the evaluated model itself, which flatters it")
    seen: dict[str, Any] = {"image_size": judge.image_size, "crop": judge.crop, "progress": True}
    scores = judged_captions(judge.model, judge.tokenizer, pairs, outputs, device, **seen)
    return {
        **scores,
        "judge": str(source),
        "judge_fingerprint": prints[0],
        "judges_itself": prints[0] == prints[1],
    }


def pair_metrics(cfg: config.Config, outputs: ModelOutputs, tokenizer: Tokenizer) -> dict[str, Any]:
    """Compute the metrics of the tasks on images with captions."""
    results: dict[str, Any] = {}
    if "losses" in cfg.run["tasks"]:
        results["losses"] = losses(outputs, **cfg.losses)
    if "retrieval" in cfg.run["tasks"]:
        results["retrieval"] = recalls(outputs)
    if "captions" in cfg.run["tasks"]:
        results["captions"] = caption_scores(outputs, tokenizer)
    if "meteor" in cfg.run["tasks"]:
        results["meteor"] = {"meteor": meteor(outputs.references, outputs.written)}
    if "relations" in cfg.run["tasks"]:
        results["relations"] = relation_accuracy(outputs.references, outputs.written)
    return results


def probe_metrics(
    cfg: config.Config, train: Features, test: Features, num_heads: int, device: torch.device
) -> dict[str, Any]:
    """Train the probes on the features of one data set, and compute their accuracy on another."""
    results: dict[str, Any] = {}
    classes = len(test.labelled.classes)
    if "linear_probe" in cfg.run["tasks"]:
        a, b, c, d = (x.to(device) for x in (train.embeddings, train.labels, test.embeddings, test.labels))
        results["linear_probe"] = linear_probe(a, b, c, d, classes, **cfg.linear_probe)
    if "attentive_probe" in cfg.run["tasks"]:
        data = train.patches, train.labels, test.patches, test.labels
        results["attentive_probe"] = attentive_probe(*data, classes, num_heads, device, **cfg.attentive_probe)
    return results


def model_facts(source: Pretrained, model: CoCa, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the facts about the model for evaluation.json."""
    return {
        "path": str(source),
        "builder": source.builder,
        "precision": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "step": step_of(source),
    }


def run_of(source: Pretrained) -> Path:
    """Returns the folder of the run that trained a model, or that of the model if it was moved out of its run.

    Of a model on the hub, it is evaluations/owner/name.
    """
    if source.repository is not None:
        return Path("evaluations", *split_name(source.repository)[:1])
    if (source.path / "progress.json").is_file():
        return source.path.parent.parent  # runs/mine/checkpoints/step_100
    run = source.path.parent  # runs/mine/model
    return run if (run / "config.yaml").is_file() else source.path


def step_of(source: Pretrained) -> int | None:
    """Returns the step of a checkpoint, None for other models."""
    return read_progress(source.path)["step"] if (source.path / "progress.json").is_file() else None


if __name__ == "__main__":
    run_main(main)
