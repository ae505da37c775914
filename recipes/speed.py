"""Measure training steps and captions beside those of open_clip 3.3.

    python recipes/speed.py --config recipes/configs/speed/gpu.yaml
    python recipes/speed.py --config recipes/configs/speed/tiny.yaml run.packages=[grr]

One process, on random images and captions that are on the device; a GPU where there is one, else the CPU. Seconds are
medians after a warm-up. open_clip's model has the same widths, layers and vocabulary, its steps are autocast to
bfloat16 with fused AdamW, and it pads every caption to the context. Its row is the one after ours, so that both see the
same machine. "caption" is the mean length of the captions in tokens, without special ones (full: as many as have room),
and "padded" the columns of the texts that a training step reads. "of peak" is the fraction of run.peak_tflops, "of
matmul" that of the rate of one large product measured in the same run; FLOPs are those that our step needs, without
recomputation, and those that open_clip's step executes. Rows are written to run.folder as soon as they are measured, to
speed.json and as a table to speed.md; after run.seconds no further row begins, and those that were not measured are
listed.
"""

import gc
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from grr import config  # before torch, whose threads it sets

# isort: split
import torch
from torch import nn

from grr.cli.program import run_main
from grr.data import Batch
from grr.data.images import normalize
from grr.evaluation.flops import step_flops
from grr.evaluation.peer import OpenClipCoCa, texts_of
from grr.evaluation.timing import describe_machine, is_out_of_memory, matmul_rate, measure, processor
from grr.files.atomic import write_atomic
from grr.generation.generate import generate
from grr.models.builders import MODELS
from grr.parallel.compiled import text_multiple
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import num_processes, process_group
from grr.tokenizers import Tokenizer
from grr.training.counters import flop_counter
from grr.training.optim import adamw, clip_gradients
from grr.training.random_batches import NumberTokenizer, random_batches
from grr.training.step import global_batch_step

Package = Literal["grr", "open_clip"]
Variant = Literal["fp32", "bf16", "fp32 compile", "bf16 compile"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARED = ("dim", "num_heads", "vocab_size", "context_length", "image_size", "patch_size", "num_queries")
LAYERS = ("vision_layers", "text_layers", "multimodal_layers")
TABLE = "| {:<13} | {:<9} | {:<12} | {:>5} | {:>7} | {:>6} | {:>9} | {:>9} | {:>7} | {:>9} | {:>7} | {:>6} |"
HEADS = (
    "what",
    "package",
    "variant",
    "batch",
    "caption",
    "padded",
    "seconds",
    "samples/s",
    "of peak",
    "of matmul",
    "peak GB",
    "ratio",
)
Row = dict[str, Any]


@dataclass
class Run:
    """Options of the recipe."""

    folder: str = "runs/speed"  # speed.json, speed.md and config.yaml
    seed: int = 0
    seconds: float = 420.0  # after which no further row begins
    packages: list[Package] = field(default_factory=lambda: ["grr", "open_clip"])  # that are measured
    variants: list[Variant] = field(default_factory=lambda: ["bf16", "bf16 compile"])  # precision, and compilation
    batch_sizes: list[int] = field(default_factory=lambda: [48, 256])  # pairs of a training step
    caption_tokens: list[int | None] = field(default_factory=lambda: [None, 15])  # mean; null: as many as have room
    images: list[int] = field(default_factory=lambda: [1, 32])  # that captions are written for at a time
    written_tokens: int = 30  # of each caption
    peak_tflops: float = 989.0  # of the device in dense bfloat16; 989: H100 and H200 SXM
    max_grad_norm: float = 1.0  # largest norm of the gradient; open_clip's is not clipped
    warmup: int = 3
    iterations: int = 10


SECTIONS: config.Sections = {"run": Run, "model": MODELS, "loss": global_batch_step, "optimizer": adamw}


class Case(NamedTuple):
    """What a row measures."""

    what: Literal["training step", "captions"]
    package: Package
    variant: Variant
    samples: int
    caption_tokens: int | None  # the mean of a training step's, None: as many as have room; or those written

    def facts(self) -> Row:
        return {**self._asdict()}


class Work(NamedTuple):
    """A call to be timed."""

    act: Callable[[], object]
    padded_tokens: int | None = None  # columns of a text that a training step reads
    flops: int | None = None


def main() -> None:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    validate_config(cfg)
    folder, begun = Path(run.folder), time.monotonic()
    with process_group() as device:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", config.to_yaml(cfg))

        # the machine: its fastest matrix product
        words = list(dict.fromkeys(variant.split()[0] for variant in run.variants))
        rates = {
            word: matmul_rate(device, DTYPES[word], warmup=run.warmup, iterations=run.iterations) for word in words
        }
        result: Row = {"machine": describe_machine(device), "matmul": rates, "model": cfg.model, "rows": []}
        write = partial(write_result, folder, result)
        print(headline(result), flush=True)

        # the rows: each is on disk as soon as it is measured
        for case in cases(run):
            if time.monotonic() - begun > run.seconds:
                row = {**case.facts(), "not_measured": f"run.seconds={run.seconds:g} had passed"}
            else:
                row = measured(case, cfg, run, device)
            result["rows"].append(with_rates(row, result, run))
            print(as_line(row), flush=True)
            write()


def validate_config(cfg: config.Config) -> None:
    """Raises ValueError with everything that would fail later."""
    run, room = cfg.get(Run), cfg.model["context_length"] - 3  # the most tokens of a caption
    wrong = []
    if (processes := num_processes()) != 1:
        wrong.append(f"one process is measured, got {processes}; start it without torchrun")
    if not 1 <= run.written_tokens <= room:
        wrong.append(f"written_tokens must be from 1 to {room}, got {run.written_tokens}")
    if any(mean is not None and not 1 <= mean <= room for mean in run.caption_tokens):
        wrong.append(f"caption_tokens must be null or a mean from 1 to {room}, got {run.caption_tokens}")
    if wrong:
        raise ValueError("speed: " + "; ".join(wrong))


def cases(run: Run) -> list[Case]:
    """The rows, those that compile last: they take a minute each before the first step."""
    training = [
        Case("training step", package, variant, samples, tokens)
        for variant in run.variants
        for samples in run.batch_sizes
        for tokens in run.caption_tokens
        for package in run.packages
    ]
    captions = [
        Case("captions", package, variant, samples, run.written_tokens)
        for variant in run.variants
        if "compile" not in variant
        for samples in run.images
        for package in run.packages
    ]
    return sorted([*training, *captions], key=lambda case: "compile" in case.variant)


def measured(case: Case, cfg: config.Config, run: Run, device: torch.device) -> Row:
    """Build the model of a row, time it, and free it. A row that memory does not suffice for says so."""
    build = {
        ("training step", "grr"): grr_training,
        ("training step", "open_clip"): open_clip_training,
        ("captions", "grr"): grr_captions,
        ("captions", "open_clip"): open_clip_captions,
    }[case.what, case.package]
    torch.compiler.reset()  # an earlier variant's code counts against torch's limit of compiled versions
    try:
        work = build(case, cfg, run, device)
        times = measure(work.act, device, warmup=run.warmup, iterations=run.iterations)
    except ModuleNotFoundError as error:
        return {**case.facts(), "not_measured": str(error)}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        why = str(error).splitlines()[0]
        gc.collect()
        return {**case.facts(), "not_measured": f"out of memory: {why}"}
    return {**case.facts(), "padded_tokens": work.padded_tokens, "flops": work.flops, **times._asdict()}


# --- the two packages ---------------------------------------------------------------------------------------------


def grr_training(case: Case, cfg: config.Config, run: Run, device: torch.device) -> Work:
    """An optimizer step as in recipes/pretrain.py."""
    with torch.device("meta"):
        model: nn.Module = cfg.build("model")
    parallelize(model, device, bf16="bf16" in case.variant, compile="compile" in case.variant)
    initialize(model, device, seed=run.seed)
    optimizer = adamw(model.train(), **cfg.optimizer)
    batch = a_batch(case, cfg, run, device)
    flops = step_flops(MODELS[cfg.model["name"]], [batch], **cfg.arguments("model"))

    def step() -> None:
        global_batch_step(model, [batch], run.seed, **cfg.loss)
        clip_gradients(model, run.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Work(step, batch.ids.shape[1], flops)


def open_clip_training(case: Case, cfg: config.Config, run: Run, device: torch.device) -> Work:
    model, context_length = open_clip(cfg, device).train(), cfg.model["context_length"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = a_batch(case, cfg, run, device)
    images = normalize(batch.images)
    texts = texts_of(batch, context_length=context_length, cls_id=cfg.model["vocab_size"] - 1)
    compiled = torch.compile(model) if "compile" in case.variant else model

    def step(model: Callable[..., torch.Tensor]) -> None:
        with autocast(case, device):
            loss = model(images, texts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with flop_counter() as counter:
        step(model)
    return Work(partial(step, compiled), context_length, counter.get_total_flops())


@torch.no_grad()
def grr_captions(case: Case, cfg: config.Config, run: Run, device: torch.device) -> Work:
    with torch.device("meta"):
        model = cfg.build("model")
    initialize(model.to(DTYPES[case.variant]), device, seed=run.seed)
    n, tokenizer = run.written_tokens, cast(Tokenizer, numbers(cfg))
    images = a_batch(case, cfg, run, device).images
    write = partial(generate, model.eval(), images, tokenizer, max_new_tokens=n, min_new_tokens=n)
    return Work(write)


def open_clip_captions(case: Case, cfg: config.Config, run: Run, device: torch.device) -> Work:
    model, tokens = open_clip(cfg, device).eval(), numbers(cfg)
    images = normalize(a_batch(case, cfg, run, device).images)

    def write() -> None:
        with torch.no_grad(), autocast(case, device):
            model.captions(images, run.written_tokens, bos_id=tokens.bos_id, eos_id=tokens.eos_id)

    return Work(write)


def open_clip(cfg: config.Config, device: torch.device) -> OpenClipCoCa:
    return OpenClipCoCa(**{name: cfg.model[name] for name in (*SHARED, *LAYERS)}).to(device)


def autocast(case: Case, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if "bf16" in case.variant else nullcontext()


def a_batch(case: Case, cfg: config.Config, run: Run, device: torch.device) -> Batch:
    """The same random images and captions for every package, on the device."""
    sizes = {key: cfg.model[key] for key in ("vocab_size", "context_length", "image_size")}
    multiple = text_multiple(device, "compile" in case.variant)
    (batch,) = random_batches(
        1,
        batch_size=case.samples,
        caption_tokens=case.caption_tokens,
        text_multiple=multiple,
        seed=run.seed,
        **sizes,
    )
    return batch.to(device)


def numbers(cfg: config.Config) -> NumberTokenizer:
    return NumberTokenizer(cfg.model["vocab_size"], cfg.model["context_length"])


# --- output --------------------------------------------------------------------------------------------------------


def with_rates(row: Row, result: Row, run: Run) -> Row:
    """Add to a row its rates, and its ratio to the row of the first package in the same case."""
    if "not_measured" in row:
        return row
    row["samples_per_second"] = row["samples"] / row["seconds"]
    if row["flops"]:
        rate = row["flops"] / row["seconds"]
        row["of_peak"], row["of_matmul"] = (
            rate / (run.peak_tflops * 1e12),
            rate / result["matmul"][row["variant"].split()[0]],
        )
    same = ("what", "variant", "samples", "caption_tokens")
    ours = (other for other in result["rows"] if all(other[key] == row[key] for key in same) and "seconds" in other)
    row["ratio"] = row["seconds"] / next(ours, row)["seconds"]  # above 1: slower than ours
    return row


def headline(result: Row) -> str:
    machine = result["machine"]
    products = ", ".join(f"{word} {rate / 1e12:,.1f} TFLOP/s" for word, rate in result["matmul"].items())
    return "\n".join(
        [
            f"{processor(machine)}, {machine['threads']} threads, torch {machine['torch']}; one product: {products}\n",
            TABLE.format(*HEADS),
            TABLE.format(*("---",) * len(HEADS)),
        ]
    )


def as_line(row: Row) -> str:
    """A row as a line of the table."""
    facts = (row["what"], row["package"], row["variant"], row["samples"], row["caption_tokens"] or "full")
    if "not_measured" in row:
        return TABLE.format(*facts, *("-",) * 7) + f" not measured: {row['not_measured']}"
    share = [f"{row[key]:.1%}" if key in row else "-" for key in ("of_peak", "of_matmul")]
    peak = f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "-"
    return TABLE.format(
        *facts,
        row["padded_tokens"] or "-",
        f"{row['seconds']:.4g}",
        f"{row['samples_per_second']:.4g}",
        *share,
        peak,
        f"{row['ratio']:.2f}",
    )


def write_result(folder: Path, result: Row) -> None:
    write_atomic(folder / "speed.json", json.dumps(result, indent=2) + "\n")
    write_atomic(folder / "speed.md", "\n".join([headline(result), *map(as_line, result["rows"])]) + "\n")


if __name__ == "__main__":
    run_main(main)
