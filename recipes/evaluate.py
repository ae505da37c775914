"""Evaluate a trained model: losses, retrieval, captions and classification.

    python recipes/evaluate.py --config recipes/configs/evaluate/openmoji.yaml model.path=runs/openmoji
    torchrun --nproc_per_node 4 recipes/evaluate.py --config recipes/configs/evaluate/coco.yaml

Writes evaluation.json and evaluation.html. The result does not depend on the number of processes; on CPUs it is equal
bit for bit if OMP_NUM_THREADS is the same. Any key of the config may follow as key=value.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from grr import config
from grr.checkpoint.training_state import read_progress
from grr.cli.program import run_main
from grr.data import DATASETS, LABELLED, Labelled, check_classes
from grr.evaluation.captions import treebank
from grr.evaluation.evaluate import captioning, losses, recalls
from grr.evaluation.examples import examples
from grr.evaluation.outputs import features, observe
from grr.evaluation.probe import attentive_probe, linear_probe
from grr.evaluation.zero_shot import accuracy, class_embeddings
from grr.generation.generate import generate
from grr.inference.pretrained import Pretrained, find_pretrained, load_pretrained
from grr.parallel.process_group import start
from grr.reports.evaluation import Confusions, as_text, write_evaluation

Task = Literal["losses", "retrieval", "captions", "zero_shot", "linear_probe", "attentive_probe"]
PAIRED: tuple[Task, ...] = ("losses", "retrieval", "captions")  # tasks that need images with captions
PROBES: tuple[Task, ...] = ("linear_probe", "attentive_probe")  # that need labelled images to train on, others to judge


@dataclass
class Run:
    """Options of the recipe."""

    folder: str | None = None  # where results are written; null: the folder of the run that trained the model
    tasks: list[Task] = field(default_factory=lambda: list(PAIRED))
    images: int | None = None  # with their captions, the first so many; null: all
    bf16: bool = False  # compute in bfloat16


@dataclass
class Model:
    """The model to judge."""

    path: str  # a run's folder, its model/, or one of its checkpoints/step_N


SECTIONS: config.Sections = {
    "run": Run,
    "model": Model,
    "data": DATASETS | config.NONE,
    "losses": losses,
    "generation": generate,
    "labelled": LABELLED | config.NONE,
    "labelled_train": LABELLED | config.NONE,
    "zero_shot": class_embeddings,
    "linear_probe": linear_probe,
    "attentive_probe": attentive_probe,
}


def main() -> None:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    validate_config(cfg)
    device = start()

    # model: whole in every process, each of which computes batches of its own
    source = find_pretrained(cfg.model["path"])
    folder = Path(run.folder) if run.folder else run_of(source)
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    model, tokenizer, image_size, crop = load_pretrained(source.path, device=device, dtype=dtype)
    logging.info(f"judging {source.path} by {', '.join(run.tasks)}")

    # look: all processes share the images, and rank 0 has what came of them
    look: dict[str, Any] = {"image_size": image_size, "crop": crop, "progress": True}
    seen = test = train = names = None
    labelled: Labelled | None = None if set(run.tasks) <= set(PAIRED) else cfg.build("labelled")
    if labelled is not None and "zero_shot" in run.tasks:  # names may be refused: known before hours of images
        names = class_embeddings(model, tokenizer, labelled.classes, device, **cfg.zero_shot)  # [c, e]
    if any(task in PAIRED for task in run.tasks):
        generation = cfg.generation if "captions" in run.tasks else None
        seen = observe(model, cfg.build("data"), tokenizer, device, images=run.images, generation=generation, **look)
    if labelled is not None:
        patches = "attentive_probe" in run.tasks
        test = features(model, labelled, device, patches=patches, **look)
        if any(task in PROBES for task in run.tasks):
            labelled_train = cfg.build("labelled_train")
            check_classes(labelled_train, labelled)
            train = features(model, labelled_train, device, patches=patches, **look)
    if dist.get_rank() > 0:
        return

    # judge: plain arithmetic, in one process
    results: dict[str, Any] = {}
    confusions = None
    if seen is not None and "losses" in run.tasks:
        results["losses"] = losses(seen, **cfg.losses)
    if seen is not None and "retrieval" in run.tasks:
        results["retrieval"] = recalls(seen)
    if seen is not None and "captions" in run.tasks:
        results["captions"] = captioning(seen, tokenizer)
    if test is not None and names is not None:
        scores = test.embeddings @ names.float().cpu().T  # [n, c]
        results["zero_shot"] = accuracy(scores, test.labels)
        confusions = Confusions.of(test.labelled.classes, scores, test.labels)
    if test is not None and train is not None:
        classes = len(test.labelled.classes)
        if "linear_probe" in run.tasks:
            a, b, c, d = (x.to(device) for x in (train.embeddings, train.labels, test.embeddings, test.labels))
            results["linear_probe"] = linear_probe(a, b, c, d, classes, **cfg.linear_probe)
        if "attentive_probe" in run.tasks:
            results["attentive_probe"] = attentive_probe(
                train.patches,
                train.labels,
                test.patches,
                test.labels,
                classes,
                model.pooler_heads,
                device,
                **cfg.attentive_probe,
            )

    # write
    evaluation = {
        "model": {
            "path": str(source.path),
            "builder": source.builder,
            "precision": str(dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "step": step_of(source),
        },
        "data": {**cfg.data, **seen.facts()} if seen else None,
        "labelled": {**cfg.labelled, **test.facts()} if test else None,
        "labelled_train": {**cfg.labelled_train, **train.facts()} if train else None,
        "generation": cfg.generation if "captions" in run.tasks else None,
        "results": results,
    }
    page = write_evaluation(folder, evaluation, examples(seen, model, tokenizer) if seen else None, confusions)
    print(as_text(evaluation))
    logging.info(f"see {page}, and evaluation.json beside it")


def validate_config(cfg: config.Config) -> None:
    """Raises ValueError if a task lacks the section of its data, ImportError if it lacks a package."""
    needs = {"data": PAIRED, "labelled": ("zero_shot", *PROBES), "labelled_train": PROBES}
    for section, wanted in needs.items():
        for task in cfg.run["tasks"]:
            if task in wanted and vars(cfg)[section]["name"] == "none":
                raise ValueError(
                    f"evaluate: the task {task} needs the section {section}, and there is none; add it to "
                    f"the config, or leave {task} out of run.tasks"
                )
    if "captions" in cfg.run["tasks"]:
        treebank()


def run_of(source: Pretrained) -> Path:
    """The folder of the run that trained a model; that of the model itself, if it was taken out of its run."""
    if (source.path / "progress.json").is_file():
        return source.path.parent.parent  # runs/mine/checkpoints/step_100
    run = source.path.parent  # runs/mine/model
    return run if (run / "config.yaml").is_file() else source.path


def step_of(source: Pretrained) -> int | None:
    """The step of a checkpoint."""
    return read_progress(source.path)["step"] if (source.path / "progress.json").is_file() else None


if __name__ == "__main__":
    run_main(main)
