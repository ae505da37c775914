"""Fine-tune a contrastive captioner that was pre-trained, until its validation loss stops falling.

    python recipes/finetune.py --config recipes/configs/finetune/photos.yaml
    torchrun --nproc_per_node 4 recipes/finetune.py --config recipes/configs/finetune/mscoco.yaml

The start is validated, and then every epoch. Three epochs without improvement bring the best weights back and divide
the learning rate by 100; the third time the run ends (GRR-CoCa, section 3.3; `grr.training.soft_reset`). The best
checkpoint so far is in best/, the model in model/. The same command, submitted again, continues where the run stopped,
also within a reset; a run that has finished is left as it is. Any key of the config may follow as key=value.
"""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from grr import config
from grr.checkpoint.identity import run_identity
from grr.checkpoint.saver import Saver
from grr.checkpoint.training_state import RunLock, load_checkpoint, load_checkpoint_weights, save_model
from grr.cli.program import run_main
from grr.config.ranges import check_ranges
from grr.data import DATASETS, InMemory, pair_counts, steps_per_epoch, training_steps
from grr.evaluation.evaluate import validate
from grr.inference.pretrained import (
    build_pretrained,
    describe,
    find_pretrained,
    load_weights,
    tell_of_other_crop,
    weights_digest,
)
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import on_rank_0, start
from grr.reports.training import write_report
from grr.seeds import derive_seed
from grr.tokenizers.sentencepiece import load_tokenizer
from grr.training.ema import EMA, weights_of, wise_ft
from grr.training.log import has_ended, open_log, summary
from grr.training.optim import adamw, clip_gradients, freeze, set_lr, warmup_cosine
from grr.training.soft_reset import SoftReset, in_words, soft_reset
from grr.training.step import check_finite, global_batch_step
from grr.training.throughput import Pace


@dataclass
class Run:
    """The recipe's own knobs."""

    folder: str = "runs/finetune"  # everything the run writes
    seed: int = 0  # of the order of the data, and dropout
    epochs: int | None = None  # at most; null: until the soft reset stops
    batch_size: int = 768  # pairs in an optimizer step, over all processes and micro-batches
    micro_batch_size: int = 48  # pairs that one process holds at a time
    max_grad_norm: float = 1.0  # largest norm of the gradient
    freeze: list[str] = field(default_factory=list)  # parts of the model that keep their weights: vision_encoder ...
    ema_decay: float = 0.0  # decay of a running mean of the weights, which is validated and kept instead; 0: none
    wise_ft_alpha: float = 1.0  # fraction of the fine-tuned weights in the model that is kept; the rest is the start's
    bf16: bool = False  # compute in bfloat16; weights and the reduction of gradients stay float32
    float8: bool | Literal["emulated"] = False  # blocks multiply in 8 bits; emulated: on any device, without the speed
    compile: bool = False  # compile each block
    activation_checkpointing: bool = False  # keep what enters each block, compute the rest again
    in_memory: bool = False  # keep decoded images, for data that fit
    dp_replicate: int = 1  # whole copies of the model, each sharded over its part of the processes (HSDP)
    log_every: int = 10  # optimizer steps
    num_eval_images: int = 500  # validation images that are retrieved from and captioned
    save_every: int = 1000  # optimizer steps; each validation saves as well
    save_minutes: float = 30.0
    keep: int = 2  # checkpoints, beside the best
    accept_changes: list[str] = field(default_factory=list)  # keys of the config that a resumed run may change
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class Start:
    """The pre-trained model."""

    path: str  # a run's folder, its model/, or one of its checkpoints/step_N; to stay there until the run has finished
    dropout: float = 0.1


def main() -> int:
    cfg = config.load(
        run=Run,
        model=Start,
        data=DATASETS,
        validation=DATASETS,
        loader=training_steps,
        loss=global_batch_step,
        optimizer=adamw,
        schedule=warmup_cosine,
        control=soft_reset,
    )
    run = Run(**cfg.run)
    folder = Path(run.folder)
    device = start()
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank == 0 else logging.WARNING)
    source = find_pretrained(cfg.model["path"])
    lock = RunLock(folder)

    # data: an order that is a pure function of the seed and the step, in the words of the pre-trained model
    pairs, held_out = cfg.build("data"), cfg.build("validation")
    if run.in_memory:
        pairs, held_out = InMemory(pairs), InMemory(held_out)
    tokenizer = load_tokenizer(source.tokenizer, context_length=source.arguments["context_length"])
    tell_of_other_crop(source, cfg.loader["crop"])
    per_epoch = steps_per_epoch(pairs, run.batch_size)
    last = math.inf if run.epochs is None else run.epochs * per_epoch
    loader = {
        "rank": rank,
        "world": world,
        "batch_size": run.batch_size,
        "micro_batch_size": run.micro_batch_size,
        "image_size": source.arguments["image_size"],
        "pin_memory": device.type == "cuda",
        **cfg.loader,
    }

    # model: built without memory, sharded, then filled, so no process ever holds all of it
    description = describe(source.builder, source.arguments | {"dropout": cfg.model["dropout"]}, cfg.loader["crop"])
    with torch.device("meta"):
        model = build_pretrained(source, dropout=cfg.model["dropout"])
    freeze(model, run.freeze)
    parallelize(
        model,
        device,
        bf16=run.bf16,
        float8=run.float8,
        compile=run.compile,
        activation_checkpointing=run.activation_checkpointing,
        dp_replicate=run.dp_replicate,
    )
    initialize(model, device, seed=run.seed)
    load_weights(source, model)
    optimizer = adamw(model, **cfg.optimizer)
    average = EMA(model, decay=run.ema_decay)

    # resume, if there is something to resume
    fingerprints = {
        "start": weights_digest(source),
        "data": pairs.fingerprint,
        "validation": held_out.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }
    saver = Saver(
        folder,
        model,
        optimizer,
        run_identity(cfg, **fingerprints),
        description=description,
        average=average.weights,
        save_every=run.save_every,
        save_minutes=run.save_minutes,
        keep=run.keep,
    )
    progress = saver.resume(accepted=run.accept_changes)
    step, control = (progress["step"], SoftReset(**progress["control"])) if progress else (0, SoftReset())
    if progress:
        logging.info(f"learning-rate regime {control.regime}; {in_words(control)}")
    end = {"step": step, "best_step": control.best_step, "wise_ft_alpha": run.wise_ft_alpha}
    if (control.decision == "stop" or control.step >= last) and on_rank_0(lambda: has_ended(folder, **end)):
        logging.info(
            f"{folder} finished before, after step {step}: the model of step {control.best_step} is in "
            f"{folder / 'model'}; see {folder / 'report.html'}"
        )
        lock.release()
        return 0
    saver.resume_best(control.best_step)
    on_rank_0(lambda: tokenizer.save(folder / "tokenizer.model"))
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **pair_counts(pairs, held_out),
        "steps_per_epoch": per_epoch,
        "world_size": world,
        "batch_size": run.batch_size,
        **fingerprints,
    }
    known = step if progress else -1  # lines up to here are kept; that of step 0, too, is only true once it is saved
    log = open_log(folder, cfg, facts, step=known, tensorboard=run.tensorboard) if rank == 0 else None
    if log and saver.changes:
        log.write(split="change", step=step, changes=saver.changes)
    title = f"{source.builder} on {cfg.data['name']}"

    # loop: an epoch, a validation, and a decision; first of all the start is validated
    batches = training_steps(pairs, tokenizer, seed=run.seed, start_step=step, **loader)
    bar = tqdm(total=None if run.epochs is None else last, initial=step, unit="step", smoothing=0.1, disable=rank > 0)
    pace = Pace(run.batch_size)
    while control.decision != "stop" and control.step < last:
        if control.step >= 0:
            with pace.waiting():
                micro_batches = [batch.to(device) for batch in next(batches)]
            lr = warmup_cosine(step, per_epoch, cfg.optimizer["lr"], **cfg.schedule) / control.divisor
            set_lr(optimizer, lr)
            losses = global_batch_step(model, micro_batches, derive_seed(run.seed, step), **cfg.loss)
            norm = clip_gradients(model, run.max_grad_norm)
            check_finite(losses, norm, step, micro_batches, folder)
            if saver.due:  # these gradients have shown that the weights are sound
                saver.save(step, control=control._asdict())
            if saver.stopping:
                bar.close()
                logging.info(f"stopped after step {step}; the same command continues")
                lock.release()
                return saver.stopping
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()
            step += 1
            pace.step(micro_batches)
            bar.update()
            bar.set_postfix(loss=f"{losses.loss:.3f}", lr=f"{lr:.1e}", refresh=False)

            if log and step % run.log_every == 0:
                log.write(
                    split="train",
                    step=step,
                    epoch=step / per_epoch,
                    **losses.numbers(),
                    lr=lr,
                    grad_norm=norm,
                    **pace.line(),
                )

        if step % per_epoch == 0:
            with pace.paused():
                with average.applied():
                    losses, found, examples = validate(
                        model, held_out, tokenizer, device, loader, cfg.loss, run.num_eval_images
                    )
                control = soft_reset(control, step, losses.loss, **cfg.control)
                if log:
                    log.write(
                        split="validation",
                        step=step,
                        epoch=step / per_epoch,
                        **losses.numbers(),
                        **found,
                        decision=control.decision,
                        regime=control.regime,
                        best_loss=control.best_loss,
                        best_step=control.best_step,
                    )
                    write_report(folder, title=title, examples=examples)
                    bar.write(f"{summary(step, losses, found)}; {in_words(control)}")
                if control.decision == "improved":  # on disk before a checkpoint names it
                    saver.save_best(step, control=control._asdict())
                if control.decision == "reset":
                    load_checkpoint(saver.best(control.best_step), model, optimizer, average.weights)
        saver.poll(step, due=step % per_epoch == 0)
    bar.close()

    # the end: the best weights, perhaps moved back toward the start, are the model
    if saver.due:
        saver.save(step, control=control._asdict())
    load_checkpoint_weights(saver.best(control.best_step), model)
    if run.wise_ft_alpha < 1:
        tuned = weights_of(model)
        load_weights(source, model)
        wise_ft(model, tuned, alpha=run.wise_ft_alpha)
    losses, found, examples = validate(model, held_out, tokenizer, device, loader, cfg.loss, run.num_eval_images)
    save_model(folder / "model", model, description, folder / "tokenizer.model")
    if log:
        log.write(
            split="final",
            step=step,
            epoch=step / per_epoch,
            **losses.numbers(),
            **found,
            best_step=control.best_step,
            wise_ft_alpha=run.wise_ft_alpha,
        )
        write_report(folder, title=title, examples=examples)
    logging.info(f"finished: the model of {summary(control.best_step, losses, found)}")
    logging.info(f"it is in {folder / 'model'}; see {folder / 'report.html'}")
    lock.release()
    return 0


if __name__ == "__main__":
    run_main(main)
