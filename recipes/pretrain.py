"""Pre-train a contrastive captioner on images with captions.

    python recipes/pretrain.py --config recipes/configs/pretrain/openmoji.yaml
    torchrun --nproc_per_node 4 recipes/pretrain.py --config recipes/configs/pretrain/cc12m_grr.yaml

The same command, submitted again, continues where the run stopped. Any key of the config may follow as key=value.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from grr import config
from grr.checkpoint.identity import run_identity
from grr.checkpoint.saver import Saver
from grr.checkpoint.training_state import RunLock, load_checkpoint_weights, save_model
from grr.cli.program import run_main
from grr.config.ranges import check_ranges
from grr.data import DATASETS, InMemory, pair_counts, steps_per_epoch, training_steps
from grr.evaluation.evaluate import validate
from grr.inference.pretrained import describe
from grr.models.builders import MODELS
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import on_rank_0, start
from grr.reports.training import write_report
from grr.seeds import derive_seed
from grr.tokenizers.sentencepiece import open_tokenizer
from grr.training.log import has_ended, open_log, summary
from grr.training.optim import adamw, clip_gradients, describe_end, set_lr, warmup_cosine
from grr.training.step import check_finite, global_batch_step
from grr.training.throughput import Pace


@dataclass
class Run:
    """The recipe's own knobs."""

    folder: str = "runs/pretrain"  # everything the run writes
    seed: int = 0  # of the initial weights, the order of the data, and dropout
    epochs: int = 21
    max_steps: int | None = None  # stop after so many optimizer steps, if that is sooner
    batch_size: int = 768  # pairs in an optimizer step, over all processes and micro-batches
    micro_batch_size: int = 48  # pairs that one process holds at a time
    max_grad_norm: float = 1.0  # largest norm of the gradient
    bf16: bool = False  # compute in bfloat16; weights and the reduction of gradients stay float32
    float8: bool | Literal["emulated"] = False  # blocks multiply in 8 bits; emulated: on any device, without the speed
    compile: bool = False  # compile each block
    activation_checkpointing: bool = False  # keep what enters each block, compute the rest again
    in_memory: bool = False  # keep decoded images, for data that fit
    dp_replicate: int = 1  # whole copies of the model, each sharded over its part of the processes (HSDP)
    log_every: int = 10  # optimizer steps
    validate_every: int | None = None  # optimizer steps; null: once an epoch
    num_eval_images: int = 500  # validation images that are retrieved from and captioned
    save_every: int = 1000  # optimizer steps
    save_minutes: float = 30.0
    keep: int = 2  # checkpoints
    keep_model: Literal["best", "last"] = "best"  # the weights in model/: of the lowest validation loss, or the last
    accept_changes: list[str] = field(default_factory=list)  # keys of the config that a resumed run may change
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)


def main() -> int:
    cfg = config.load(
        run=Run,
        model=MODELS,
        tokenizer=open_tokenizer,
        data=DATASETS,
        validation=DATASETS,
        loader=training_steps,
        loss=global_batch_step,
        optimizer=adamw,
        schedule=warmup_cosine,
    )
    run = Run(**cfg.run)
    folder = Path(run.folder)
    device = start()
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank == 0 else logging.WARNING)
    lock = RunLock(folder)

    # data: an order that is a pure function of the seed and the step
    pairs, held_out = cfg.build("data"), cfg.build("validation")
    if run.in_memory:
        pairs, held_out = InMemory(pairs), InMemory(held_out)
    tokenizer = open_tokenizer(pairs.captions, folder / "tokenizer.model", **cfg.tokenizer)
    per_epoch = steps_per_epoch(pairs, run.batch_size)
    last = min(run.epochs * per_epoch, run.max_steps or run.epochs * per_epoch)
    validate_every = run.validate_every or per_epoch
    image_size, crop = cfg.model["image_size"], cfg.loader["crop"]
    loader = {
        "rank": rank,
        "world": world,
        "batch_size": run.batch_size,
        "micro_batch_size": run.micro_batch_size,
        "image_size": image_size,
        "pin_memory": device.type == "cuda",
        **cfg.loader,
    }

    # model: built without memory, sharded, then filled, so no process ever holds all of it
    cfg.model |= {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
    description = describe(cfg.model["name"], {k: v for k, v in cfg.model.items() if k != "name"}, crop)
    with torch.device("meta"):
        model = cfg.build("model")
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
    optimizer = adamw(model, **cfg.optimizer)

    # resume, if there is something to resume
    fingerprints = {"data": pairs.fingerprint, "validation": held_out.fingerprint, "tokenizer": tokenizer.fingerprint}
    saver = Saver(
        folder,
        model,
        optimizer,
        run_identity(cfg, **fingerprints),
        description=description,
        save_every=run.save_every,
        save_minutes=run.save_minutes,
        keep=run.keep,
    )
    progress = saver.resume(accepted=run.accept_changes) or {"step": 0, "best_loss": None, "best_step": -1}
    step = progress["step"]
    last = max(last, step)  # run.epochs may have been lowered
    best = {key: progress[key] for key in ("best_loss", "best_step")}
    if step == last and on_rank_0(lambda: has_ended(folder, step=last, keep_model=run.keep_model)):
        logging.info(f"{folder} finished before, after step {last}; see {folder / 'report.html'}")
        lock.release()
        return 0
    saver.resume_best(best["best_step"])
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        **pair_counts(pairs, held_out),
        "steps_per_epoch": per_epoch,
        "world_size": world,
        "batch_size": run.batch_size,
        **fingerprints,
    }
    log = open_log(folder, cfg, facts, step=step, tensorboard=run.tensorboard) if rank == 0 else None
    if log and saver.changes:
        log.write(split="change", step=step, changes=saver.changes)
    report, title = folder / "report.html", f"{cfg.model['name']} on {cfg.data['name']}"
    logging.info(describe_end(last, per_epoch, cfg.optimizer["lr"], **cfg.schedule))

    # loop: one optimizer step sees the whole global batch, however many micro-batches carry it
    batches = training_steps(pairs, tokenizer, seed=run.seed, start_step=step, **loader)
    bar = tqdm(total=last, initial=step, unit="step", smoothing=0.1, disable=rank > 0)
    pace, examples = Pace(run.batch_size), None
    while step < last:
        with pace.waiting():
            micro_batches = [batch.to(device) for batch in next(batches)]
        lr = warmup_cosine(step, per_epoch, cfg.optimizer["lr"], **cfg.schedule)
        set_lr(optimizer, lr)
        losses = global_batch_step(model, micro_batches, derive_seed(run.seed, step), **cfg.loss)
        norm = clip_gradients(model, run.max_grad_norm)
        check_finite(losses, norm, step, micro_batches, folder)
        if saver.due:  # these gradients have shown that the weights are sound
            saver.save(step, **best)
        if saver.stopping:
            bar.close()
            logging.info(f"stopped after step {step} of {last}; the same command continues")
            lock.release()
            return saver.stopping
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        pace.step(micro_batches)
        bar.update()
        bar.set_postfix(loss=f"{losses.loss:.3f}", lr=f"{lr:.1e}", refresh=False)

        if log and (step % run.log_every == 0 or step == last):
            log.write(
                split="train",
                step=step,
                epoch=step / per_epoch,
                **losses.numbers(),
                lr=lr,
                grad_norm=norm,
                **pace.line(),
            )
            if not report.is_file():
                write_report(folder, title=title, examples=None)

        if step % validate_every == 0 or step == last:
            with pace.paused():
                losses, found, examples = validate(
                    model, held_out, tokenizer, device, loader, cfg.loss, run.num_eval_images
                )
                check_finite(losses, norm, step, micro_batches, folder)
                if best["best_loss"] is None or losses.loss < best["best_loss"]:
                    best = {"best_loss": losses.loss, "best_step": step}
                    saver.save_best(step, **best)
                if log:
                    log.write(
                        split="validation", step=step, epoch=step / per_epoch, **losses.numbers(), **found, **best
                    )
                    write_report(folder, title=title, examples=examples)
                    bar.write(summary(step, losses, found))
        saver.poll(step, due=step == last)
    bar.close()

    # the end: the model is the best one, or the last
    if saver.due:
        saver.save(step, **best)
    kept = best["best_step"] if run.keep_model == "best" else last
    if kept < last:
        load_checkpoint_weights(saver.best(kept), model)
    if kept < last or examples is None:
        losses, found, examples = validate(model, held_out, tokenizer, device, loader, cfg.loss, run.num_eval_images)
    save_model(folder / "model", model, description, folder / "tokenizer.model")
    if log:
        log.write(
            split="final",
            step=last,
            epoch=last / per_epoch,
            **losses.numbers(),
            **found,
            model_step=kept,
            keep_model=run.keep_model,
        )
        write_report(folder, title=title, examples=examples)
    logging.info(
        f"finished after step {last} of {last}; model/ holds the {run.keep_model} weights, of step {kept}; see {report}"
    )
    lock.release()
    return 0


if __name__ == "__main__":
    run_main(main)
