"""Fine-tune a classifier of images, questions about them, or statements.

    python recipes/finetune_classifier.py --config recipes/configs/finetune_classifier/classification.yaml
    torchrun --nproc_per_node 4 recipes/finetune_classifier.py --config recipes/configs/finetune_classifier/vqa.yaml

The model comes from a pre-trained run, or is new. The best so far is in best/, and in model/ when the run has finished.
The same command, submitted again, continues where the run stopped. Any key of the config may follow as key=value.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from grr import config  # before torch: grr sets how its threads wait

# isort: split
import torch
import torch.distributed as dist
from tqdm import tqdm

from grr.checkpoint.adapters import merge_adapters
from grr.checkpoint.identity import run_identity
from grr.checkpoint.model_folder import save_model
from grr.checkpoint.run_lock import RunLock
from grr.checkpoint.saver import Saver
from grr.checkpoint.step_folders import has_checkpoints
from grr.checkpoint.training_state import load_checkpoint_weights
from grr.cli.program import run_main
from grr.data import (
    LABELLED,
    augmented,
    check_classes,
    check_disjoint,
    pair_counts,
    steps_per_epoch,
    text_only_accuracy,
    training_steps,
)
from grr.data.order import check_batches
from grr.evaluation.classification import answers, classification_scores, classification_step
from grr.evaluation.examples import Examples, captioned_pictures
from grr.inference.classifiers import describe_classifier, load_parts
from grr.inference.pretrained import (
    build_pretrained,
    describe_adapters,
    find_pretrained,
    tell_of_other_crop,
    weights_digest,
)
from grr.models.builders import MODELS, check_builder
from grr.models.coca import CoCa
from grr.models.heads import HEADS
from grr.models.tuning import check_adapter_dropout, tune_parts
from grr.parallel.compiled import text_multiple
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import num_processes, on_rank_0, process_group
from grr.reports.training import write_report
from grr.seeds import derive_seed
from grr.tokenizers import open_tokenizer
from grr.training.finite import FiniteCheck
from grr.training.log import open_log, parameter_counts
from grr.training.loggers import LoggerName, check_loggers
from grr.training.micro_batch import choose_micro_batch_size
from grr.training.optim import adamw, clip_gradients
from grr.training.schedule import set_lr, warmup_cosine
from grr.training.throughput import Throughput


@dataclass
class Run:
    """Options of the recipe."""

    folder: str = "runs/classifier"  # everything the run writes
    seed: int = 0  # of the initial weights, the order of the data, and dropout
    epochs: int = 10
    max_steps: int | None = None  # stop after so many optimizer steps, if that is sooner
    patience: int | None = None  # stop after so many validations that are not better than the best; null: never
    batch_size: int = 256  # samples in an optimizer step, over all processes and micro-batches
    micro_batch_size: int | None = None  # samples that one process holds at a time; null: as many as fit its memory
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it
    log_every: int = 10  # optimizer steps
    validate_every: int | None = None  # optimizer steps; null: once an epoch
    loggers: list[LoggerName] = field(default_factory=list)


def pretrained(*, path: str, dropout: float = 0.1) -> CoCa:
    """A model that was trained: a run's folder, its model/, one of its checkpoints/step_N, or hf-hub:owner/name."""
    return build_pretrained(find_pretrained(path), dropout=dropout)


SECTIONS: config.Sections = {
    "run": Run,
    "model": {"pretrained": pretrained, **MODELS},
    "head": HEADS,
    "tuning": tune_parts,
    "tokenizer": open_tokenizer,
    "data": LABELLED,
    "validation": LABELLED,
    "loader": training_steps,
    "augment": augmented,
    "loss": classification_step,
    "optimizer": adamw,
    "schedule": warmup_cosine,
    "parallel": parallelize,
    "saving": Saver,
}


def main() -> int:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    check_loggers(run.loggers)
    folder = Path(run.folder)
    source = find_pretrained(cfg.model["path"]) if cfg.model["name"] == "pretrained" else None
    cfg.loader["crop"] = cfg.loader["crop"] or (source.crop if source else "squash")
    check(cfg, run)
    with process_group() as device, RunLock(folder):
        # data: labelled; the tokenizer is the pre-trained model's, if there is one
        pairs, held_out = cfg.build("data"), cfg.build("validation")
        check_classes(pairs, held_out)
        check_disjoint(pairs, held_out)
        if source is not None:
            cfg.tokenizer |= {"path": str(source.tokenizer), "context_length": source.arguments["context_length"]}
            tell_of_other_crop(source, cfg.loader["crop"])
        file, resuming = folder / "tokenizer.model", has_checkpoints(folder / "checkpoints")
        tokenizer = on_rank_0(lambda: open_tokenizer(pairs.captions, file, resuming, **cfg.tokenizer))
        per_epoch = steps_per_epoch(pairs, run.batch_size)
        text_only = text_only_accuracy(pairs, held_out)

        # model: the head on the parts of a CoCa, built without memory, sharded, then initialised or loaded
        if source is not None:
            builder, arguments = source.builder, source.arguments | {"dropout": cfg.model["dropout"]}
        else:
            cfg.model |= {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
            builder, arguments = cfg.model["name"], cfg.arguments("model")
        description = describe_classifier(builder, arguments, cfg.loader["crop"], cfg.head["name"], pairs.classes)
        with torch.device("meta"):
            model = cfg.build("head", cfg.build("model"), len(pairs.classes))
        tune_parts(model, **cfg.tuning)
        parallelize(model, device, **cfg.parallel)
        initialize(model, device, seed=run.seed)
        if source is not None:
            load_parts(source, model)
        optimizer = adamw(model, **cfg.optimizer)

        # resume, if there is a checkpoint
        content = {
            "start": weights_digest(source) if source else None,
            "data": pairs.fingerprint,
            "validation": held_out.fingerprint,
            "tokenizer": tokenizer.fingerprint,
        }
        identity, described = run_identity(cfg, **content), description
        if source is not None and cfg.tuning["lora"]:  # checkpoints hold what is trained alone
            described = describe_adapters(description, source, rank=cfg.tuning["rank"], alpha=cfg.tuning["alpha"])
        saver = Saver(folder, model, optimizer, identity=identity, description=described, **cfg.saving)
        progress = saver.resume() or {"step": 0, "best": -1.0, "best_step": -1}
        step, best = progress["step"], {key: progress[key] for key in ("best", "best_step")}
        saver.resume_best(best["best_step"])
        gradients = partial(classification_step, model, seed=0, **cfg.loss)
        size, resumed = arguments["image_size"], folder if step else None
        cfg.run["micro_batch_size"] = choose_micro_batch_size(
            cfg.run, gradients, model, optimizer, tokenizer, size, resumed=resumed
        )
        loader = loader_arguments(cfg, run, device, image_size=size)
        facts = {
            **parameter_counts(model),
            "classes": len(pairs.classes),
            **pair_counts(pairs, held_out),
            "text_only_accuracy": text_only,
            "steps_per_epoch": per_epoch,
            **content,
        }
        log = open_log(folder, cfg, facts, step=step, loggers=run.loggers, changes=saver.changes)

        # loop: the best model so far is kept
        last = min(run.epochs * per_epoch, run.max_steps or run.epochs * per_epoch)
        validate_every = run.validate_every or per_epoch
        reading = {"image_size": arguments["image_size"], "crop": cfg.loader["crop"]}
        changed = augmented(pairs, **cfg.augment)
        batches = training_steps(changed, tokenizer, seed=run.seed, start_step=step, **loader)
        bar = tqdm(total=last, initial=step, unit="step", smoothing=0.1, disable=dist.get_rank() > 0)
        throughput, finite = Throughput(run.batch_size), FiniteCheck(folder)
        while step < last and not (run.patience and step - max(0, best["best_step"]) >= run.patience * validate_every):
            with throughput.waiting():
                micro_batches = [batch.to(device) for batch in next(batches)]
            lr = warmup_cosine(step, per_epoch, cfg.optimizer["lr"], **cfg.schedule)
            set_lr(optimizer, lr)
            step_scores = classification_step(model, micro_batches, derive_seed(run.seed, step), **cfg.loss)
            norm = clip_gradients(model, run.max_grad_norm)
            finite.record(step, step_scores, norm, micro_batches)
            if saver.due:
                finite.check()  # finite gradients show that the weights of this step are finite
                saver.save(step, **best)
            if saver.stopping:
                bar.close()
                logging.info(f"stopped after step {step} of {last}; the same command continues")
                return saver.stopping
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            throughput.step(micro_batches)
            bar.update()

            if step % run.log_every == 0 or step == last:  # only here does the host wait for the device
                finite.check()
                scores = step_scores.read()
                log.write("train", step, **scores._asdict(), lr=lr, grad_norm=norm.item(), **throughput.metrics())
                bar.set_postfix(loss=f"{scores.loss:.3f}", lr=f"{lr:.1e}", refresh=False)

            if step % validate_every == 0 or step == last:
                with throughput.paused():
                    finite.check()
                    result = classification_scores(model, held_out, tokenizer, device, **reading)
                    if result.accuracy > best["best"]:  # on disk before a checkpoint names it
                        best = {"best": result.accuracy, "best_step": step}
                        saver.save_best(step, **best)
                    shown = Examples([], [], answers(model, held_out, tokenizer, device, **reading))
                    beside = {
                        "text_only_accuracy": text_only,
                        "best_accuracy": best["best"],
                        "best_step": best["best_step"],
                    }
                    log.write("validation", step, captioned_pictures(shown), **result.numbers(), **beside)
                    on_rank_0(partial(write_report, folder, title=f"{builder} on {cfg.data['name']}", examples=shown))
                    if not bar.disable:
                        vqa = "" if result.vqa_accuracy is None else f"; VQA accuracy {result.vqa_accuracy:.1%}"
                        bar.write(
                            f"step {step}: validation loss {result.loss:.4f}, accuracy {result.accuracy:.1%}; best "
                            f"{best['best']:.1%} at step {best['best_step']}; text-only baseline {text_only:.1%}{vqa}"
                        )
            saver.poll(step, due=step % validate_every == 0 or step == last)
        bar.close()

        # the end: the best is the model
        if saver.due:
            saver.save(step, **best)
        load_checkpoint_weights(saver.best(best["best_step"]), model)
        merge_adapters(model)
        save_model(folder / "model", model, description, folder / "tokenizer.model")
        log.close()
        logging.info(f"finished after step {step} of {last}; model/ holds the best; see {folder / 'report.html'}")
    return 0


def check(cfg: config.Config, run: Run) -> None:
    """Raise ValueError, before the data are read, for options and sizes that do not fit each other or the model."""
    check_batches(run.batch_size, run.micro_batch_size, num_processes())
    warmup_cosine(0, 1, cfg.optimizer["lr"], **cfg.schedule)
    check_adapter_dropout(cfg.tuning["lora"], cfg.tuning["dropout"], run.micro_batch_size)
    if cfg.model["name"] != "pretrained":
        check_builder(MODELS[cfg.model["name"]])
    with torch.device("meta"):
        coca = cfg.build("model")
        model = cfg.build("head", coca, 2)
    trained, parts = cfg.model["name"] == "pretrained", dict(coca.named_children())
    known = [name for name, _ in model.named_children() if trained and name in parts]
    adapted = cfg.tuning["lora"]
    if adapted and (new := [part for part in (*adapted, *cfg.tuning["frozen"]) if part not in known]):
        why = (
            f"which it does not have: new parts are trained in full; name parts that it has, {', '.join(known)}"
            if trained
            else f"with model.name={cfg.model['name']}; remove it from tuning, or set model.name=pretrained"
        )
        raise ValueError(
            "finetune_classifier: beside adapters, what is not trained must have the weights of a trained model, got "
            f"{', '.join(new)}, {why}"
        )
    tune_parts(model, **cfg.tuning)


def loader_arguments(cfg: config.Config, run: Run, device: torch.device, *, image_size: int) -> dict[str, Any]:
    """Returns the arguments of `training_steps` that the config's section does not hold."""
    return {
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "batch_size": run.batch_size,
        "micro_batch_size": cfg.run["micro_batch_size"],
        "image_size": image_size,
        "pin_memory": device.type == "cuda",
        "text_multiple": text_multiple(device, cfg.parallel["compile"]),
        **cfg.loader,
    }


if __name__ == "__main__":
    run_main(main)
