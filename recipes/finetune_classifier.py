"""Fine-tune a contrastive captioner to tell classes: of images, of questions about them, of statements about them.

    python recipes/finetune_classifier.py --config recipes/configs/finetune_classifier/classification.yaml
    torchrun --nproc_per_node 4 recipes/finetune_classifier.py --config recipes/configs/finetune_classifier/vqa.yaml

The model comes from a pre-trained run, or is new. The best so far is in best/, and in model/ when the run has finished.
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
from grr.data import (
    LABELLED,
    pair_counts,
    refuse_other_classes,
    steps_per_epoch,
    text_only_accuracy,
    training_steps,
)
from grr.evaluation.classification import answers, classification_scores, classification_step
from grr.inference.pretrained import build_pretrained, find_pretrained, tell_of_other_crop, weights_digest
from grr.models.builders import MODELS
from grr.models.coca import CoCa
from grr.models.heads import HEADS, describe_classifier, load_parts
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import start
from grr.reports.training import Examples, write_report
from grr.seeds import derive_seed
from grr.tokenizers.sentencepiece import open_tokenizer
from grr.training.log import open_log
from grr.training.optim import adamw, clip_gradients, freeze, set_lr, warmup_cosine
from grr.training.step import check_finite
from grr.training.throughput import Pace


@dataclass
class Run:
    """The recipe's own knobs."""

    folder: str = "runs/classifier"  # everything the run writes
    seed: int = 0  # of the initial weights, the order of the data, and dropout
    epochs: int = 10
    max_steps: int | None = None  # stop after so many optimizer steps, if that is sooner
    patience: int | None = None  # stop after so many validations that are not better than the best; null: never
    batch_size: int = 256  # samples in an optimizer step, over all processes and micro-batches
    micro_batch_size: int = 64  # samples that one process holds at a time
    max_grad_norm: float = 1.0  # largest norm of the gradient
    freeze: list[str] = field(default_factory=list)  # parts of the model that keep their weights: vision_encoder ...
    bf16: bool = False  # compute in bfloat16; weights and the reduction of gradients stay float32
    float8: bool | Literal["emulated"] = False  # blocks multiply in 8 bits; emulated: on any device, without the speed
    compile: bool = False  # compile each block
    activation_checkpointing: bool = False  # keep what enters each block, compute the rest again
    dp_replicate: int = 1  # whole copies of the model, each sharded over its part of the processes (HSDP)
    log_every: int = 10  # optimizer steps
    validate_every: int | None = None  # optimizer steps; null: once an epoch
    save_every: int = 1000  # optimizer steps
    save_minutes: float = 30.0
    keep: int = 2  # checkpoints
    accept_changes: list[str] = field(default_factory=list)  # keys of the config that a resumed run may change
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)


def pretrained(*, path: str, dropout: float = 0.1) -> CoCa:
    """A model that was trained: a run's folder, its model/, or one of its checkpoints/step_N."""
    return build_pretrained(find_pretrained(path), dropout=dropout)


def main() -> int:
    cfg = config.load(
        run=Run,
        model={"pretrained": pretrained, **MODELS},
        head=HEADS,
        tokenizer=open_tokenizer,
        data=LABELLED,
        validation=LABELLED,
        loader=training_steps,
        loss=classification_step,
        optimizer=adamw,
        schedule=warmup_cosine,
    )
    run = Run(**cfg.run)
    folder = Path(run.folder)
    device = start()
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank == 0 else logging.WARNING)
    source = find_pretrained(cfg.model["path"]) if cfg.model["name"] == "pretrained" else None
    lock = RunLock(folder)

    # data: labelled, and read in the words of the pre-trained model if there is one
    pairs, held_out = cfg.build("data"), cfg.build("validation")
    refuse_other_classes(pairs, held_out)
    if source is not None:
        cfg.tokenizer |= {"path": str(source.tokenizer), "context_length": source.arguments["context_length"]}
        tell_of_other_crop(source, cfg.loader["crop"])
    tokenizer = open_tokenizer(pairs.captions, folder / "tokenizer.model", **cfg.tokenizer)
    per_epoch = steps_per_epoch(pairs, run.batch_size)
    last = min(run.epochs * per_epoch, run.max_steps or run.epochs * per_epoch)
    validate_every = run.validate_every or per_epoch

    # model: the head on the parts of a CoCa, built without memory, sharded, then filled
    if source is not None:
        builder, arguments = source.builder, source.arguments | {"dropout": cfg.model["dropout"]}
    else:
        cfg.model |= {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
        builder, arguments = cfg.model["name"], {key: x for key, x in cfg.model.items() if key != "name"}
    description = describe_classifier(builder, arguments, cfg.loader["crop"], cfg.head["name"], pairs.classes)
    with torch.device("meta"):
        model = cfg.build("head", cfg.build("model"), len(pairs.classes))
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
    if source is not None:
        load_parts(source, model)
    optimizer = adamw(model, **cfg.optimizer)
    loader = {
        "rank": rank,
        "world": world,
        "batch_size": run.batch_size,
        "micro_batch_size": run.micro_batch_size,
        "image_size": arguments["image_size"],
        "pin_memory": device.type == "cuda",
        **cfg.loader,
    }

    # resume, if there is something to resume
    fingerprints = {
        "start": weights_digest(source) if source else None,
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
        save_every=run.save_every,
        save_minutes=run.save_minutes,
        keep=run.keep,
    )
    progress = saver.resume(accepted=run.accept_changes) or {"step": 0, "best": -1.0, "best_step": -1}
    step, best = progress["step"], {key: progress[key] for key in ("best", "best_step")}
    saver.resume_best(best["best_step"])
    blind = text_only_accuracy(pairs, held_out)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "classes": len(pairs.classes),
        **pair_counts(pairs, held_out),
        "text_only_accuracy": blind,
        "steps_per_epoch": per_epoch,
        "world_size": world,
        "batch_size": run.batch_size,
        **fingerprints,
    }
    log = open_log(folder, cfg, facts, step=step, tensorboard=run.tensorboard) if rank == 0 else None
    if log and saver.changes:
        log.write(split="change", step=step, changes=saver.changes)

    # loop: the best model so far is kept
    batches = training_steps(pairs, tokenizer, seed=run.seed, start_step=step, **loader)
    bar = tqdm(total=last, initial=step, unit="step", smoothing=0.1, disable=rank > 0)
    pace = Pace(run.batch_size)
    while step < last and not (run.patience and step - max(0, best["best_step"]) >= run.patience * validate_every):
        with pace.waiting():
            micro_batches = [batch.to(device) for batch in next(batches)]
        lr = warmup_cosine(step, per_epoch, cfg.optimizer["lr"], **cfg.schedule)
        set_lr(optimizer, lr)
        scores = classification_step(model, micro_batches, derive_seed(run.seed, step), **cfg.loss)
        norm = clip_gradients(model, run.max_grad_norm)
        check_finite(scores, norm, step, micro_batches, folder)
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
        bar.set_postfix(loss=f"{scores.loss:.3f}", lr=f"{lr:.1e}", refresh=False)

        if log and (step % run.log_every == 0 or step == last):
            log.write(
                split="train",
                step=step,
                epoch=step / per_epoch,
                **scores._asdict(),
                lr=lr,
                grad_norm=norm,
                **pace.line(),
            )

        if step % validate_every == 0 or step == last:
            with pace.paused():
                scores = classification_scores(
                    model, held_out, tokenizer, device, image_size=arguments["image_size"], crop=cfg.loader["crop"]
                )
                if scores.accuracy > best["best"]:  # on disk before a checkpoint names it
                    best = {"best": scores.accuracy, "best_step": step}
                    saver.save_best(step, **best)
                shown = answers(
                    model, held_out, tokenizer, device, image_size=arguments["image_size"], crop=cfg.loader["crop"]
                )
                if log:
                    log.write(
                        split="validation",
                        step=step,
                        epoch=step / per_epoch,
                        **scores._asdict(),
                        text_only_accuracy=blind,
                        best_accuracy=best["best"],
                        best_step=best["best_step"],
                    )
                    write_report(folder, title=f"{builder} on {cfg.data['name']}", examples=Examples([], [], shown))
                    bar.write(
                        f"step {step}: validation loss {scores.loss:.4f}, accuracy {scores.accuracy:.1%}; best "
                        f"{best['best']:.1%} at step {best['best_step']}; {blind:.1%} without a look at the images"
                    )
        saver.poll(step, due=step % validate_every == 0 or step == last)
    bar.close()

    # the end: the best is the model
    if saver.due:
        saver.save(step, **best)
    load_checkpoint_weights(saver.best(best["best_step"]), model)
    save_model(folder / "model", model, description, folder / "tokenizer.model")
    logging.info(
        f"finished after step {step} of {last}; the best model is in {folder / 'model'}; see {folder / 'report.html'}"
    )
    lock.release()
    return 0


if __name__ == "__main__":
    run_main(main)
