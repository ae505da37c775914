"""Pre-train a contrastive captioner on images with captions.

    python recipes/pretrain.py --config recipes/configs/pretrain/openmoji.yaml
    torchrun --nproc_per_node 4 recipes/pretrain.py --config recipes/configs/pretrain/cc12m_grr.yaml

The same command, submitted again, continues where the run stopped. Any key of the config may follow as key=value.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
from grr.data import DATASETS, InMemory, Pairs, augmented, check_disjoint, pair_counts, steps_per_epoch, training_steps
from grr.data.order import check_batches, check_negatives
from grr.evaluation.evaluate import validate
from grr.evaluation.examples import captioned_pictures, training_examples
from grr.inference.pretrained import describe, describe_adapters, find_pretrained, load_weights
from grr.inference.towers import load_tower, open_tower
from grr.models.builders import MODELS, check_builder
from grr.models.towers import TOWER_MODELS
from grr.models.tuning import check_adapter_dropout, tune_parts
from grr.parallel.compiled import text_multiple
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import num_processes, on_rank_0, process_group
from grr.reports.training import write_report
from grr.seeds import derive_seed
from grr.tokenizers import open_tokenizer
from grr.training.finite import FiniteCheck
from grr.training.log import has_ended, open_log, parameter_counts, summary
from grr.training.loggers import LoggerName, check_loggers
from grr.training.micro_batch import choose_micro_batch_size
from grr.training.optim import adamw, clip_gradients
from grr.training.schedule import describe_end, set_lr, set_patch_dropout, warmup_cosine
from grr.training.step import global_batch_step
from grr.training.throughput import Throughput


@dataclass
class Run:
    """Options of the recipe."""

    folder: str = "runs/pretrain"  # everything the run writes
    seed: int = 0  # of the initial weights, the order of the data, and dropout
    epochs: int = 21
    max_steps: int | None = None  # stop after so many optimizer steps, if that is sooner
    patch_dropout_epochs: int | None = None  # the first with model.patch_dropout, the rest without; null: all with it
    batch_size: int = 768  # pairs in an optimizer step, over all processes and micro-batches
    micro_batch_size: int | None = None  # pairs that one process holds at a time; null: as many as fit its memory
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it
    in_memory: bool = False  # keep decoded images, for data that fit
    log_every: int = 10  # optimizer steps
    validate_every: int | None = None  # optimizer steps; null: once an epoch
    num_eval_images: int = 500  # validation images for retrieval and captions
    keep_model: Literal["best", "last"] = "best"  # the weights in model/: of the lowest validation loss, or the last
    loggers: list[LoggerName] = field(default_factory=list)


BUILDERS = MODELS | TOWER_MODELS
SECTIONS: config.Sections = {
    "run": Run,
    "model": BUILDERS,
    "tuning": tune_parts,
    "tokenizer": open_tokenizer,
    "data": DATASETS,
    "validation": DATASETS,
    "loader": training_steps,
    "augment": augmented,
    "loss": global_batch_step,
    "optimizer": adamw,
    "schedule": warmup_cosine,
    "parallel": parallelize,
    "saving": Saver,
}


def main() -> int:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    folder = Path(run.folder)
    check_builder(BUILDERS[cfg.model["name"]])
    tower = open_tower(cfg.model, folder)  # a vision encoder of another library, or None
    if tower is not None:
        image_size = cfg.model["image_size"] or tower.description["image_size"]
        cfg.model |= {"vision_config": tower.description, "image_size": image_size}
    cfg.loader["crop"] = cfg.loader["crop"] or (tower.description["crop"] if tower else "squash")
    with torch.device("meta"):  # sizes that do not fit each other are refused before the data are read
        tune_parts(cfg.build("model"), **cfg.tuning)
    check_adapter_dropout(cfg.tuning["lora"], cfg.tuning["dropout"], run.micro_batch_size)
    check_loggers(run.loggers)
    check_batches(run.batch_size, run.micro_batch_size, num_processes())
    check_negatives(run.batch_size, run.micro_batch_size, cfg.loss["negatives"])
    warmup_cosine(0, 1, cfg.optimizer["lr"], **cfg.schedule)  # raises ValueError if min_lr is above lr
    report = partial(write_report, folder, title=f"{cfg.model['name']} on {cfg.data['name']}")
    with process_group() as device, RunLock(folder):
        # data: an order that is a pure function of the seed and the step
        pairs, held_out = read_data(cfg, run)
        file, resuming = folder / "tokenizer.model", has_checkpoints(folder / "checkpoints")
        tokenizer = on_rank_0(lambda: open_tokenizer(pairs.captions, file, resuming, **cfg.tokenizer))
        per_epoch = steps_per_epoch(pairs, run.batch_size)

        # model: built without memory, sharded, then initialised, so that no rank ever holds all of it
        cfg.model |= {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
        with torch.device("meta"):
            model = cfg.build("model")
        tune_parts(model, **cfg.tuning)
        parallelize(model, device, **cfg.parallel)
        initialize(model, device, seed=run.seed)
        if tower is not None and not resuming:
            load_tower(tower, model)
        optimizer = adamw(model, **cfg.optimizer)

        # resume, if there is a checkpoint
        content = {"data": pairs.fingerprint, "validation": held_out.fingerprint, "tokenizer": tokenizer.fingerprint}
        if tower is not None:
            content["tower"] = on_rank_0(tower.fingerprint)
        description = described = describe(cfg.model["name"], cfg.arguments("model"), cfg.loader["crop"])
        if cfg.tuning["lora"]:  # checkpoints hold what is trained, beside the weights that the run began with
            if not resuming:
                save_model(folder / "start", model, description, file)
            start = find_pretrained(folder / "start")
            load_weights(start, model)
            described = describe_adapters(description, start, rank=cfg.tuning["rank"], alpha=cfg.tuning["alpha"])
        identity = run_identity(cfg, **content)
        saver = Saver(folder, model, optimizer, identity=identity, description=described, **cfg.saving)
        progress = saver.resume() or {"step": 0, "best_loss": None, "best_step": -1}
        step, best = progress["step"], {key: progress[key] for key in ("best_loss", "best_step")}
        last = max(step, min(run.epochs * per_epoch, run.max_steps or run.epochs * per_epoch))
        if step == last and on_rank_0(lambda: has_ended(folder, step=last, keep_model=run.keep_model)):
            logging.info(f"{folder} finished before, after step {last}; see {folder / 'report.html'}")
            return 0
        saver.resume_best(best["best_step"])
        set_patch_dropout(model, patch_dropout_at(run.epochs, cfg, run))  # as at the end, where steps take most memory
        gradients = partial(global_batch_step, model, seed=0, **cfg.loss)
        cfg.run["micro_batch_size"] = choose_micro_batch_size(
            cfg.run, gradients, model, optimizer, tokenizer, cfg.model["image_size"], resumed=folder if step else None
        )
        loader = loader_arguments(cfg, run, device)
        facts = {**parameter_counts(model), **pair_counts(pairs, held_out), "steps_per_epoch": per_epoch, **content}
        log = open_log(folder, cfg, facts, step=step, loggers=run.loggers, changes=saver.changes)
        logging.info(describe_end(last, per_epoch, cfg.optimizer["lr"], **cfg.schedule))
        if step == 0:  # a page with pictures is there before the first step
            on_rank_0(lambda: report(examples=training_examples(pairs)))
        logging.info(f"{folder / 'report.html'} shows the progress")

        # loop: one optimizer step sees the whole global batch, however many micro-batches carry it
        evaluate = partial(validate, model, held_out, tokenizer, device, loader, cfg.loss, run.num_eval_images)
        validate_every = run.validate_every or per_epoch
        whole = cfg.loss["negatives"] == "global"  # a loss of the global batch, however it is cut
        batches = training_steps(pairs, tokenizer, seed=run.seed, start_step=step, longest_first=whole, **loader)
        bar = tqdm(total=last, initial=step, unit="step", smoothing=0.1, disable=dist.get_rank() > 0)
        throughput, finite, examples = Throughput(run.batch_size), FiniteCheck(folder), None
        while step < last:
            with throughput.waiting():
                micro_batches = [batch.to(device) for batch in next(batches)]
            lr = warmup_cosine(step, per_epoch, cfg.optimizer["lr"], **cfg.schedule)
            set_lr(optimizer, lr)
            set_patch_dropout(model, patch_dropout_at(step // per_epoch, cfg, run))
            step_losses = global_batch_step(model, micro_batches, derive_seed(run.seed, step), **cfg.loss)
            norm = clip_gradients(model, run.max_grad_norm)
            finite.record(step, step_losses, norm, micro_batches)
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
                losses = step_losses.read()
                log.write("train", step, **losses.numbers(), lr=lr, grad_norm=norm.item(), **throughput.metrics())
                bar.set_postfix(loss=f"{losses.loss:.3f}", lr=f"{lr:.1e}", refresh=False)
                if not bar.disable and (estimate := throughput.time_left(last - step)):
                    bar.write(estimate)
            if step == run.log_every:  # the first point of the curves
                with throughput.paused():
                    on_rank_0(lambda: report(examples=training_examples(pairs)))

            if step % validate_every == 0 or step == last:
                with throughput.paused():
                    finite.check()
                    losses, metrics, examples = evaluate(check=partial(finite.check_validation, step))
                    if best["best_loss"] is None or losses.loss < best["best_loss"]:
                        best = {"best_loss": losses.loss, "best_step": step}
                        saver.save_best(step, **best)  # on disk before a checkpoint names it
                    log.write("validation", step, captioned_pictures(examples), **losses.numbers(), **metrics, **best)
                    on_rank_0(partial(report, examples=examples))
                    if not bar.disable:
                        bar.write(summary(step, losses, metrics))
            saver.poll(step, due=step == last)
        bar.close()

        # the end: the model is the best one, or the last
        if saver.due:
            saver.save(step, **best)
        kept = best["best_step"] if run.keep_model == "best" else last
        if kept < last:
            load_checkpoint_weights(saver.best(kept), model)
        if kept < last or examples is None:
            losses, metrics, examples = evaluate()
        if cfg.tuning["lora"]:
            merge_adapters(model)
        save_model(folder / "model", model, description, file)
        log.write("final", last, **losses.numbers(), **metrics, model_step=kept, keep_model=run.keep_model)
        log.close()
        on_rank_0(partial(report, examples=examples))
        ending = f"finished after step {last} of {last}; model/ holds the {run.keep_model} weights, of step {kept}"
        logging.info(f"{ending}; see {folder / 'report.html'}")
    return 0


def read_data(cfg: config.Config, run: Run) -> tuple[Pairs, Pairs]:
    """Returns the training pairs and the validation pairs."""
    pairs, held_out = cfg.build("data"), cfg.build("validation")
    check_disjoint(pairs, held_out)
    if run.in_memory:
        pairs, held_out = InMemory(pairs), InMemory(held_out)
    return augmented(pairs, **cfg.augment), held_out


def patch_dropout_at(epoch: int, cfg: config.Config, run: Run) -> float:
    """Returns the fraction of the patches that the steps of an epoch, counted from 0, leave out."""
    ended = run.patch_dropout_epochs is not None and epoch >= run.patch_dropout_epochs
    return 0.0 if ended else cfg.model.get("patch_dropout", 0.0)


def loader_arguments(cfg: config.Config, run: Run, device: torch.device) -> dict[str, Any]:
    """Returns the arguments that training and validation batches share."""
    return {
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "batch_size": run.batch_size,
        "micro_batch_size": cfg.run["micro_batch_size"],
        "image_size": cfg.model["image_size"],
        "pin_memory": device.type == "cuda",
        "text_multiple": text_multiple(device, cfg.parallel["compile"]),
        **cfg.loader,
    }


if __name__ == "__main__":
    run_main(main)
