"""Fine-tune a contrastive captioner until its validation loss stops falling.

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
from functools import partial
from pathlib import Path
from typing import Any

from grr import config  # before torch: grr sets how its threads wait

# isort: split
import torch
import torch.distributed as dist
from tqdm import tqdm

from grr.checkpoint.adapters import merge_adapters, save_adapters
from grr.checkpoint.identity import run_identity
from grr.checkpoint.model_folder import save_model
from grr.checkpoint.run_lock import RunLock
from grr.checkpoint.saver import Saver
from grr.checkpoint.training_state import load_checkpoint, load_checkpoint_weights
from grr.cli.program import run_main
from grr.data import DATASETS, InMemory, Pairs, augmented, check_disjoint, pair_counts, steps_per_epoch, training_steps
from grr.data.order import check_batches, check_negatives
from grr.evaluation.evaluate import validate
from grr.evaluation.examples import captioned_pictures
from grr.inference.pretrained import (
    Pretrained,
    build_pretrained,
    describe,
    describe_adapters,
    find_pretrained,
    load_weights,
    tell_of_other_crop,
    weights_digest,
)
from grr.models.coca import CoCa
from grr.models.tuning import check_adapter_dropout, tune_parts
from grr.parallel.compiled import text_multiple
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import num_processes, on_rank_0, process_group
from grr.reports.training import write_report
from grr.seeds import derive_seed
from grr.tokenizers import load_tokenizer
from grr.training.ema import EMA, weights_of, wise_ft
from grr.training.finite import FiniteCheck
from grr.training.log import has_ended, open_log, parameter_counts, summary
from grr.training.loggers import LoggerName, check_loggers
from grr.training.micro_batch import choose_micro_batch_size
from grr.training.optim import adamw, clip_gradients
from grr.training.schedule import set_lr, warmup_cosine
from grr.training.soft_reset import SoftReset, describe_decision, soft_reset
from grr.training.step import global_batch_step
from grr.training.throughput import Throughput


@dataclass
class Run:
    """Options of the recipe."""

    folder: str = "runs/finetune"  # everything the run writes
    seed: int = 0  # of the order of the data, and dropout
    epochs: int | None = None  # at most; null: until the soft reset stops
    batch_size: int = 768  # pairs in an optimizer step, over all processes and micro-batches
    micro_batch_size: int | None = None  # pairs that one process holds at a time; null: as many as fit its memory
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it
    ema_decay: float = 0.0  # decay of a moving average of the weights, which is validated and kept instead; 0: none
    wise_ft_alpha: float = 1.0  # fraction of the fine-tuned weights in the model; the rest is the pre-trained weights
    merge_adapters: bool = True  # add adapters to the weights in model/; false: keep what was trained beside model.path
    in_memory: bool = False  # keep decoded images, for data that fit
    log_every: int = 10  # optimizer steps
    num_eval_images: int = 500  # validation images for retrieval and captions
    loggers: list[LoggerName] = field(default_factory=list)


@dataclass
class Start:
    """The pre-trained model."""

    path: (
        str  # a run's folder, its model/, checkpoints/step_N, or hf-hub:owner/name; to stay until the run has finished
    )
    dropout: float = 0.1


SECTIONS: config.Sections = {
    "run": Run,
    "model": Start,
    "tuning": tune_parts,
    "data": DATASETS,
    "validation": DATASETS,
    "loader": training_steps,
    "augment": augmented,
    "loss": global_batch_step,
    "optimizer": adamw,
    "schedule": warmup_cosine,
    "control": soft_reset,
    "parallel": parallelize,
    "saving": Saver,
}


def main() -> int:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    check_loggers(run.loggers)
    folder, source = Path(run.folder), find_pretrained(cfg.model["path"])
    cfg.loader["crop"] = cfg.loader["crop"] or source.crop
    check(cfg, run, source)
    report = partial(write_report, folder, title=f"{source.builder} on {cfg.data['name']}")
    with process_group() as device, RunLock(folder):
        # data: an order that is a pure function of the seed and the step; the tokenizer is the pre-trained model's
        pairs, held_out = read_data(cfg, run)
        tokenizer = load_tokenizer(source.tokenizer, context_length=source.arguments["context_length"])
        tell_of_other_crop(source, cfg.loader["crop"])
        per_epoch = steps_per_epoch(pairs, run.batch_size)

        # model: built without memory, sharded, then loaded, so that no rank ever holds all of it
        with torch.device("meta"):
            model = build_pretrained(source, dropout=cfg.model["dropout"])
        tune_parts(model, **cfg.tuning)
        parallelize(model, device, **cfg.parallel)
        initialize(model, device, seed=run.seed)
        load_weights(source, model)
        optimizer = adamw(model, **cfg.optimizer)
        ema = EMA(model, decay=run.ema_decay)

        # resume, if there is a checkpoint
        content = {
            "start": weights_digest(source),
            "data": pairs.fingerprint,
            "validation": held_out.fingerprint,
            "tokenizer": tokenizer.fingerprint,
        }
        adapted = bool(cfg.tuning["lora"])
        merged, described = describe_run(cfg, source)
        identity = run_identity(cfg, **content)
        saver = Saver(folder, model, optimizer, ema.weights, identity=identity, description=described, **cfg.saving)
        progress = saver.resume()
        step, control = (progress["step"], SoftReset(**progress["control"])) if progress else (0, SoftReset())
        last = math.inf if run.epochs is None else run.epochs * per_epoch
        kept = {"wise_ft_alpha": run.wise_ft_alpha} | ({"merge_adapters": run.merge_adapters} if adapted else {})
        end = {"step": step, "best_step": control.best_step, **kept}
        if (control.decision == "stop" or control.step >= last) and on_rank_0(lambda: has_ended(folder, **end)):
            logging.info(f"{folder} finished before; model/ holds the weights of step {control.best_step}")
            return 0
        saver.resume_best(control.best_step)
        gradients = partial(global_batch_step, model, seed=0, **cfg.loss)
        size, resumed = source.arguments["image_size"], folder if step else None
        cfg.run["micro_batch_size"] = choose_micro_batch_size(
            cfg.run, gradients, model, optimizer, tokenizer, size, resumed=resumed
        )
        loader = loader_arguments(cfg, run, device, image_size=size)
        on_rank_0(lambda: tokenizer.save(folder / "tokenizer.model"))
        facts = {**parameter_counts(model), **pair_counts(pairs, held_out), "steps_per_epoch": per_epoch, **content}
        kept_lines = step if progress else -1  # without a checkpoint, the line of step 0 is written again as well
        log = open_log(folder, cfg, facts, step=kept_lines, loggers=run.loggers, changes=saver.changes)
        evaluate = partial(validate, model, held_out, tokenizer, device, loader, cfg.loss, run.num_eval_images)
        finite = FiniteCheck(folder)
        bar_total = None if run.epochs is None else last
        bar = tqdm(total=bar_total, initial=step, unit="step", smoothing=0.1, disable=dist.get_rank() > 0)

        def judge(control: SoftReset) -> SoftReset:
            """Validate the weights of this step, decide by the loss, and keep the best."""
            with ema.applied():
                losses, metrics, examples = evaluate(check=partial(finite.check_validation, step))
            control = soft_reset(control, step, losses.loss, **cfg.control)
            state = {key: getattr(control, key) for key in ("decision", "regime", "best_loss", "best_step")}
            log.write("validation", step, captioned_pictures(examples), **losses.numbers(), **metrics, **state)
            on_rank_0(partial(report, examples=examples))
            if not bar.disable:
                bar.write(f"{summary(step, losses, metrics)}; {describe_decision(control)}")
            if control.decision == "improved":  # on disk before a checkpoint names it
                saver.save_best(step, control=control._asdict())
            if control.decision == "reset":
                load_checkpoint(saver.best(control.best_step), model, optimizer, ema.weights)
            return control

        # loop: an epoch, a validation, and a decision; the pre-trained weights are validated first
        if progress:
            logging.info(f"learning-rate regime {control.regime}; {describe_decision(control)}")
        else:
            control = judge(control)
            saver.poll(step, due=True)
        whole = cfg.loss["negatives"] == "global"  # a loss of the global batch, however it is cut
        batches = training_steps(pairs, tokenizer, seed=run.seed, start_step=step, longest_first=whole, **loader)
        throughput = Throughput(run.batch_size)
        while control.decision != "stop" and control.step < last:
            with throughput.waiting():
                micro_batches = [batch.to(device) for batch in next(batches)]
            lr = warmup_cosine(step, per_epoch, cfg.optimizer["lr"], **cfg.schedule) / control.divisor
            set_lr(optimizer, lr)
            step_losses = global_batch_step(model, micro_batches, derive_seed(run.seed, step), **cfg.loss)
            norm = clip_gradients(model, run.max_grad_norm)
            finite.record(step, step_losses, norm, micro_batches)
            if saver.due:
                finite.check()  # finite gradients show that the weights of this step are finite
                saver.save(step, control=control._asdict())
            if saver.stopping:
                bar.close()
                logging.info(f"stopped after step {step}; the same command continues")
                return saver.stopping
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update()
            step += 1
            throughput.step(micro_batches)
            bar.update()

            if step % run.log_every == 0:  # only here does the host wait for the device
                finite.check()
                losses = step_losses.read()
                log.write("train", step, **losses.numbers(), lr=lr, grad_norm=norm.item(), **throughput.metrics())
                bar.set_postfix(loss=f"{losses.loss:.3f}", lr=f"{lr:.1e}", refresh=False)
            if step % per_epoch == 0:
                with throughput.paused():
                    finite.check()
                    control = judge(control)
            saver.poll(step, due=step % per_epoch == 0)
        bar.close()

        # the end: the best weights are the model, perhaps moved toward the pre-trained ones (WiSE-FT)
        if saver.due:
            saver.save(step, control=control._asdict())
        load_best(model, saver.best(control.best_step), source, run)
        losses, metrics, examples = evaluate()
        save, description = (save_model, merged) if run.merge_adapters else (save_adapters, described)
        save(folder / "model", model, description, folder / "tokenizer.model")
        log.write("final", step, **losses.numbers(), **metrics, best_step=control.best_step, **kept)
        log.close()
        on_rank_0(partial(report, examples=examples))
        logging.info(f"finished: model/ holds the weights of {summary(control.best_step, losses, metrics)}")
        logging.info(f"see {folder / 'report.html'}")
    return 0


def check(cfg: config.Config, run: Run, source: Pretrained) -> None:
    """Raise ValueError, before anything is written, for options that do not fit each other or the model."""
    check_batches(run.batch_size, run.micro_batch_size, num_processes())
    check_negatives(run.batch_size, run.micro_batch_size, cfg.loss["negatives"])
    warmup_cosine(0, 1, cfg.optimizer["lr"], **cfg.schedule)
    with torch.device("meta"):
        tune_parts(build_pretrained(source, dropout=cfg.model["dropout"]), **cfg.tuning)
    check_adapter_dropout(cfg.tuning["lora"], cfg.tuning["dropout"], run.micro_batch_size)


def describe_run(cfg: config.Config, source: Pretrained) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the descriptions of the model with all of its weights, and of what checkpoints hold.

    They differ where adapters are trained: checkpoints hold what is trained, beside the pre-trained weights.
    """
    arguments = source.arguments | {"dropout": cfg.model["dropout"]}
    merged = describe(source.builder, arguments, cfg.loader["crop"])
    if not cfg.tuning["lora"]:
        return merged, merged
    return merged, describe_adapters(merged, source, rank=cfg.tuning["rank"], alpha=cfg.tuning["alpha"])


def load_best(model: CoCa, checkpoint: Path, source: Pretrained, run: Run) -> None:
    """Make the best weights those of the model: mixed with the pre-trained ones, and adapters merged, as run says."""
    load_checkpoint_weights(checkpoint, model)
    if run.wise_ft_alpha < 1:
        tuned = weights_of(model)
        load_weights(source, model)
        wise_ft(model, tuned, alpha=run.wise_ft_alpha)
    if run.merge_adapters:
        merge_adapters(model)


def read_data(cfg: config.Config, run: Run) -> tuple[Pairs, Pairs]:
    """Returns the training pairs and the validation pairs."""
    pairs, held_out = cfg.build("data"), cfg.build("validation")
    check_disjoint(pairs, held_out)
    if run.in_memory:
        pairs, held_out = InMemory(pairs), InMemory(held_out)
    return augmented(pairs, **cfg.augment), held_out


def loader_arguments(cfg: config.Config, run: Run, device: torch.device, *, image_size: int) -> dict[str, Any]:
    """Returns the arguments that training and validation batches share."""
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
