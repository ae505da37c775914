"""Pre-train a contrastive captioner on images with captions.

    python recipes/pretrain.py --config recipes/configs/pretrain/openmoji.yaml
    torchrun --nproc_per_node 4 recipes/pretrain.py --config recipes/configs/pretrain/cc12m_grr.yaml

The same command, submitted again, continues where the run stopped. Any key of the config may follow as key=value.
"""

import gc
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from grr import config
from grr.builders import MODELS
from grr.checkpoint import RunLock, StopSignal, latest_checkpoint, load_checkpoint, save_checkpoint, save_model
from grr.components import PAIRING
from grr.data import DATASETS, Batch, steps_per_epoch, training_steps, validation_steps
from grr.distributed import (
    all_sum,
    checkpoint_activations,
    compile_blocks,
    materialize,
    reset_seed,
    shard,
    start,
)
from grr.evaluate import examine
from grr.log import MetricsLog, write_manifest
from grr.optim import adamw, set_lr, warmup_cosine
from grr.report import write_report
from grr.step import Losses, evaluation_losses, global_batch_step
from grr.tokenizer import open_tokenizer


@dataclass
class Run:
    """The recipe's own knobs."""

    folder: str = "runs/pretrain"  # everything the run writes
    seed: int = 0  # of the initial weights, the order of the data, and dropout
    epochs: int = 21
    max_steps: int | None = None  # stop after so many optimizer steps, if that is sooner
    batch_size: int = 768  # pairs in an optimizer step, over all processes and micro-batches
    micro_batch_size: int = 48  # pairs that one process holds at a time
    clip: float = 1.0  # largest norm of the gradient
    bf16: bool = False  # compute in bfloat16; weights and the reduction of gradients stay float32
    compile: bool = False  # compile each block
    checkpoint_activations: bool = False  # keep what enters each block, compute the rest again
    replicas: int = 1  # whole copies of the model, each sharded over its part of the processes (HSDP)
    log_every: int = 10  # optimizer steps
    validate_every: int | None = None  # optimizer steps; null: once an epoch
    candidates: int = 500  # validation images that are retrieved from and captioned
    save_every: int = 1000  # optimizer steps
    save_minutes: float = 30.0
    keep: int = 2  # checkpoints
    tensorboard: bool = False


def main() -> None:
    cfg = config.load(
        run=Run, model=MODELS, tokenizer=open_tokenizer, data=DATASETS, validation=DATASETS, loader=training_steps,
        loss=global_batch_step, optimizer=adamw, schedule=warmup_cosine,
    )  # fmt: skip
    run = Run(**cfg.run)
    folder = Path(run.folder)
    device = start()
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank == 0 else logging.WARNING)
    stop = StopSignal()
    lock = RunLock(folder)

    # data: an order that is a pure function of the seed and the step
    pairs, held_out = cfg.build("data"), cfg.build("validation")
    tokenizer = open_tokenizer(pairs.captions, folder / "tokenizer.model", **cfg.tokenizer)
    per_epoch = steps_per_epoch(pairs, run.batch_size)
    last = min(run.epochs * per_epoch, run.max_steps or run.epochs * per_epoch)
    validate_every = run.validate_every or per_epoch
    image_size, crop = cfg.model["image_size"], cfg.loader["crop"]
    loader = {"rank": rank, "world": world, "batch_size": run.batch_size, "micro_batch_size": run.micro_batch_size,
              "image_size": image_size, "pin_memory": device.type == "cuda", **cfg.loader}  # fmt: skip

    # model: built without memory, sharded, then filled, so no process ever holds all of it
    cfg.model |= {"vocab_size": tokenizer.vocab_size, "context": tokenizer.context}
    with torch.device("meta"):
        model = cfg.build("model")
    if run.checkpoint_activations:
        checkpoint_activations(model)
    if run.compile:
        compile_blocks(model)
    shard(model, device, bf16=run.bf16, replicas=run.replicas)
    materialize(model, device, seed=run.seed)
    optimizer = adamw(model, **cfg.optimizer)

    # resume, if there is something to resume
    step = 0
    identity = {"data": pairs.fingerprint, "tokenizer": tokenizer.fingerprint, "seed": run.seed,
                "batch_size": run.batch_size}  # fmt: skip
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, model, optimizer)
        refuse_another_run(folder, progress["identity"], identity)
        step = progress["step"]
        logging.info(f"resuming {folder} after step {step} of {last}")
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "training_pairs": len(pairs),
             "validation_pairs": len(held_out), "steps_per_epoch": per_epoch, **identity}  # fmt: skip
    log = open_log(run, cfg, step, facts) if rank == 0 else None

    # loop: one optimizer step sees the whole global batch, however many micro-batches carry it
    batches = training_steps(pairs, tokenizer, seed=run.seed, start_step=step, **loader)
    bar = tqdm(total=last, initial=step, unit="step", smoothing=0.1, disable=rank > 0)
    saved = logged = time.monotonic()
    waited, replaced = 0.0, 0
    while step < last:
        before = time.monotonic()
        micro_batches = [batch.to(device) for batch in next(batches)]
        waited += time.monotonic() - before
        replaced += sum(batch.replaced for batch in micro_batches)
        lr = warmup_cosine(step, per_epoch, cfg.optimizer["lr"], **cfg.schedule)
        set_lr(optimizer, lr)
        losses = global_batch_step(model, micro_batches, reset_seed(run.seed, step), **cfg.loss)
        norm = clip_grad_norm_(model.parameters(), run.clip).full_tensor().item()
        refuse_non_finite(losses, norm, step, micro_batches, folder)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{losses.loss:.3f}", lr=f"{lr:.1e}", refresh=False)

        if step % run.log_every == 0 or step == last:
            now = time.monotonic()
            steps = (step - 1) % run.log_every + 1
            if log:
                log.write(split="train", step=step, epoch=step / per_epoch, **numbers(losses), lr=lr, grad_norm=norm,
                          samples_per_second=steps * run.batch_size / (now - logged), data_wait=waited / steps,
                          replaced=replaced)  # fmt: skip
            logged, waited, replaced = now, 0.0, 0

        if step % validate_every == 0 or step == last:
            batches_of = validation_steps(held_out, tokenizer, **loader)
            losses = evaluation_losses(model, ([b.to(device) for b in batch] for batch in batches_of), **cfg.loss)
            found, examples = examine(model, held_out, tokenizer, device, candidates=run.candidates,
                                      image_size=image_size, crop=crop)  # fmt: skip
            if log:
                log.write(split="validation", step=step, epoch=step / per_epoch, **numbers(losses), **found)
                write_report(folder, title=f"{cfg.model['name']} on {cfg.data['name']}", examples=examples)
                bar.write(summary(step, losses, found))
            logged = time.monotonic()

        stopping = stop.requested()
        late = all_sum(time.monotonic() - saved > 60 * run.save_minutes)[0] > 0
        if step % run.save_every == 0 or step == last or stopping or late:
            progress = {"step": step, "identity": identity}
            save_checkpoint(folder / "checkpoints", model, optimizer, progress, keep=run.keep)
            saved = time.monotonic()
        if stopping:
            break

    bar.close()
    if step == last:
        save_model(folder / "model", model, describe(cfg), folder / "tokenizer.model")
    end = "finished" if step == last else "stopped; the same command continues"
    logging.info(f"{end} after step {step} of {last}; see {folder / 'report.html'}")
    lock.release()


def refuse_another_run(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A checkpoint continues the run that wrote it, on the same data in the same order, and no other."""
    changed = [f"{key}: {saved[key]} there, {value} here" for key, value in wanted.items() if saved[key] != value]
    if changed:
        raise ValueError(f"pretrain: {folder} holds the checkpoints of another run ({'; '.join(changed)}); "
                         "set another run.folder, or go back to the config saved in that folder")  # fmt: skip


def open_log(run: Run, cfg: config.Config, step: int, facts: dict[str, Any]) -> MetricsLog:
    """Write down what runs, on what; then open the file of its numbers."""
    folder = Path(run.folder)
    config.save(cfg, folder / "config.yaml")
    write_manifest(folder, step=step, world_size=dist.get_world_size(), **facts)
    return MetricsLog(folder, step=step, tensorboard=run.tensorboard)


def refuse_non_finite(losses: Losses, norm: float, step: int, batches: Sequence[Batch], folder: Path) -> None:
    """Stop all processes before an update that would ruin the weights, and name the pairs that led to it."""
    if math.isfinite(losses.loss) and math.isfinite(norm):
        return
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, [batch.names for batch in batches])
    file = folder / f"non_finite_step_{step}.json"
    if dist.get_rank() == 0:
        file.write_text(json.dumps({"step": step, "losses": losses._asdict(), "grad_norm": norm, "names": names}))
    raise FloatingPointError(
        f"pretrain: {losses} with a gradient of norm {norm} at step {step}, in the batch of {names[0][0][0]} (all its "
        f"names are in {file}); the weights were not updated. Look at those pairs, lower optimizer.lr or raise "
        "schedule.warmup_steps, then submit the same command to continue from the last checkpoint"
    )


def numbers(losses: Losses) -> dict[str, float]:
    return {**losses._asdict(), "perplexity": losses.perplexity}


def summary(step: int, losses: Losses, found: dict[str, float]) -> str:
    return (
        f"step {step}: validation loss {losses.loss:.4f}, perplexity {losses.perplexity:.4f}, contrastive loss "
        f"{losses.contrastive_loss:.4f}; R@1 {found['image_to_text_r1']:.1%} image to text, "
        f"{found['text_to_image_r1']:.1%} text to image; {found['caption_exact']:.1%} of captions exact"
    )


def describe(cfg: config.Config) -> dict[str, Any]:
    """What building the model again takes, beside its weights and its tokenizer."""
    arguments = {key: value for key, value in cfg.model.items() if key != "name"}
    return {"format": 1, "builder": cfg.model["name"], "arguments": arguments, "rotary_pairing": PAIRING,
            "crop": cfg.loader["crop"]}  # fmt: skip


if __name__ == "__main__":
    main()
    gc.collect()  # a sharded model that is still alive may abort the end of the process group
    dist.destroy_process_group()
