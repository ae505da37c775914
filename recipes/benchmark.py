"""Measure time and memory of training steps, towers and captions.

    python recipes/benchmark.py --config recipes/configs/benchmark/grr_coca.yaml
    python recipes/benchmark.py --config recipes/configs/benchmark/tiny.yaml run.variants='[bf16, bf16 compile]'

First, counts that do not depend on the machine: operations of a training step, waits of the host for the device, calls
of Python and C, memory kept for the backward pass, FLOPs. Then times.

One process, on random images and captions in memory, so that no step waits for data. Seconds are medians after a
warm-up. "faster" and "memory" are ratios to the first row of the same kind, so compare rows of one run. "utilisation"
is the fraction of the rate that this machine reached in the same run: of matrix products for training and towers, of
reading the weights once per token for captions. run.folder/benchmark.json holds all numbers, each row as soon as it is
measured. If memory does not suffice, the row says so, and the next variant follows.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from grr import config  # before torch: grr sets how its threads wait

# isort: split
import torch
from torch import Tensor, nn

from grr.cli.program import run_main
from grr.data import Batch
from grr.data.order import largest_divisor
from grr.evaluation.flops import decoding_bytes, forward_flops, step_flops
from grr.evaluation.timing import describe_machine, matmul_rate, measure, processor, read_rate, until_out_of_memory
from grr.files.atomic import write_atomic
from grr.generation.generate import generate
from grr.models.builders import MODELS
from grr.models.coca import CoCa, MultimodalDecoder
from grr.parallel.compiled import text_multiple
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import num_processes, process_group
from grr.seeds import derive_seed
from grr.tokenizers import Tokenizer
from grr.training import counters
from grr.training.optim import adamw, clip_gradients
from grr.training.random_batches import NumberTokenizer, random_batches
from grr.training.step import global_batch_step

Part = Literal["counts", "training", "towers", "captions"]
Variant = Literal[
    "fp32",
    "fp32 compile",
    "fp32 checkpoint",
    "fp32 compile checkpoint",
    "bf16",
    "bf16 compile",
    "bf16 checkpoint",
    "bf16 compile checkpoint",
    "bf16 float8",
    "bf16 compile float8",
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIGA = 1e9
TABLE = "{:<17}{:<54}{:>9}{:>11}{:>10}{:>12}{:>9}{:>8}{:>8}"
HEADS = ("seconds", "samples/s", "G/s", "utilisation", "peak GB", "faster", "memory")
COUNTS = (
    "{}, captions of {}: {:,} operations, {} waits, {:,} host calls; {:.1f} MB kept a pair; FLOPs {:.2f} of needed, "
    "{:.0%} unaligned"
)
Row = dict[str, Any]


class Rates(NamedTuple):
    """The rates that this machine reaches at best."""

    flops_per_second: dict[str, float]  # of matrix products in fp32 and bf16
    bytes_per_second: float  # of reading memory


@dataclass
class Run:
    """Options of the recipe."""

    folder: str = "runs/benchmark"  # benchmark.json and config.yaml
    seed: int = 0
    parts: list[Part] = field(default_factory=lambda: ["counts", "training", "towers", "captions"])
    variants: list[Variant] = field(default_factory=lambda: ["fp32", "bf16", "bf16 compile", "bf16 checkpoint"])
    batch_size: int = 48  # pairs in an optimizer step
    micro_batch_size: int = 48  # pairs held at a time, and seen by a tower
    caption_tokens: list[int | None] = field(default_factory=lambda: [None, 15])  # mean; null: as many as have room
    max_grad_norm: float = 1.0  # largest norm of the gradient
    images: list[int] = field(default_factory=lambda: [1, 32])  # that captions are written for at a time
    num_beams: list[int] = field(default_factory=lambda: [1, 6])  # 1: greedy search
    written_tokens: int = 30  # of each caption
    warmup: int = 3
    iterations: int = 10


SECTIONS: config.Sections = {"run": Run, "model": MODELS, "loss": global_batch_step, "optimizer": adamw}


def main() -> None:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    validate_config(cfg)
    folder = Path(run.folder)
    with process_group() as device:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", config.to_yaml(cfg))

        # the machine: the rates that it reaches at best
        rates = Rates(
            {word: matmul_rate(device, DTYPES[word], **rounds(run)) for word in precisions(run)},
            read_rate(device, **rounds(run)),
        )
        with torch.device("meta"):
            parameters = sum(p.numel() for p in cfg.build("model").parameters())
        result: dict[str, Any] = {
            "machine": describe_machine(device),
            "rates": rates._asdict(),
            "model": cfg.model,
            "parameters": parameters,
            "rows": [],
        }
        print(headline(result), flush=True)

        # what a training step asks of a device, which does not depend on the machine
        if "counts" in run.parts:
            result["counts"] = list(counts(cfg, run, device))
            print("\n".join(map(count_line, result["counts"])) + "\n", flush=True)
            write_atomic(folder / "benchmark.json", json.dumps(result, indent=2) + "\n")

        # the model: a row for each measurement
        print(TABLE.format("", "", *HEADS), flush=True)
        parts = {"training": training, "towers": towers, "captions": captions}
        for part in (part for part in run.parts if part != "counts"):
            for row in parts[part](cfg, run, device, rates):
                result["rows"].append(with_ratios(row, result["rows"]))
                print(as_line(row), flush=True)
                write_atomic(folder / "benchmark.json", json.dumps(result, indent=2) + "\n")


def validate_config(cfg: config.Config) -> None:
    """Raises ValueError with everything that would fail later."""
    run, room = cfg.get(Run), cfg.model["context_length"] - 3  # the most tokens of a caption
    micro, tokens = run.micro_batch_size, run.written_tokens
    wrong = []
    if (processes := num_processes()) != 1:
        wrong.append(f"one process is measured, got {processes}; start it without torchrun")
    if run.batch_size % micro:
        fits = f"micro_batch_size={largest_divisor(run.batch_size, micro)} fits"
        wrong.append(f"batch_size must be a multiple of micro_batch_size, got {run.batch_size} and {micro}; {fits}")
    if not 1 <= tokens <= room:
        wrong.append(f"the model's context has room for captions of 1 to {room} tokens, got written_tokens={tokens}")
    if any(mean is not None and not 1 <= mean <= room for mean in run.caption_tokens):
        wrong.append(f"caption_tokens must be null or a mean from 1 to {room}, got {run.caption_tokens}")
    if wrong:
        raise ValueError("benchmark: " + "; ".join(wrong))


# --- the parts -----------------------------------------------------------------------------------------------


def counts(cfg: config.Config, run: Run, device: torch.device) -> Iterator[Row]:
    """Count what an eager training step asks of the device, in each precision (`grr.training.counters`)."""
    for word in precisions(run):
        yield from until_out_of_memory("counts", word, counts_of(cast(Variant, word), cfg, run, device))


def counts_of(variant: Variant, cfg: config.Config, run: Run, device: torch.device) -> Iterator[Row]:
    """The counts of one precision. The model is freed when they end."""
    model = trained_model(variant, cfg, run, device)
    optimizer = adamw(model, **cfg.optimizer)
    for tokens in run.caption_tokens:
        batches = some_batches(cfg, run, run.batch_size // run.micro_batch_size, device, tokens)
        act = partial(step, model, optimizer, batches, run, cfg.loss)
        act()  # makes the optimizer's state
        needed = step_flops(MODELS[cfg.model["name"]], batches, **cfg.arguments("model"))
        row = {"variant": variant, **lengths(batches, tokens), "samples": run.batch_size}
        yield {**row, **counters.count(act, model)._asdict(), "needed_flops": needed}


def training(cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """Optimizer steps as in recipes/pretrain.py, of each variant, with long and with short captions."""
    for variant in run.variants:
        yield from until_out_of_memory("training step", variant, training_of(variant, cfg, run, device, rates))


def training_of(variant: Variant, cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """The rows of one variant. The model is freed when they end."""
    multiple = text_multiple(device, "compile" in variant)
    model = trained_model(variant, cfg, run, device)
    optimizer = adamw(model, **cfg.optimizer)
    for tokens in run.caption_tokens:
        batches = some_batches(cfg, run, run.batch_size // run.micro_batch_size, device, tokens, multiple)
        act = partial(step, model, optimizer, batches, run, cfg.loss)
        flops = step_flops(MODELS[cfg.model["name"]], batches, **cfg.arguments("model"))
        yield {
            "what": "training step",
            "variant": variant,
            **lengths(batches, tokens),
            "samples": run.batch_size,
            **measure(act, device, **rounds(run))._asdict(),
            **limit(flops, "flops", rates.flops_per_second[precision(variant)]),
        }


def trained_model(variant: Variant, cfg: config.Config, run: Run, device: torch.device) -> nn.Module:
    torch.compiler.reset()  # or else an earlier variant's blocks count against the limit of compiled versions
    with torch.device("meta"):
        model = cfg.build("model")
    parallelize(
        model,
        device,
        bf16="bf16" in variant,
        float8="float8" in variant,
        compile="compile" in variant,
        activation_checkpointing="checkpoint" in variant,
    )
    initialize(model, device, seed=run.seed)
    return model


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], run: Run, loss: dict[str, Any]
) -> None:
    global_batch_step(model, batches, derive_seed(run.seed, 0), **loss)
    clip_gradients(model, run.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def towers(cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """A forward pass of each tower and of the whole model, on one micro-batch of the longest captions."""
    for word in precisions(run):
        yield from until_out_of_memory("towers", word, towers_of(word, cfg, run, device, rates))


@torch.no_grad()
def towers_of(word: str, cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """The rows of one precision. The model is freed when they end."""
    (batch,) = some_batches(cfg, run, 1, device)
    ids, positions, b = batch.ids, batch.positions, len(batch.ids)
    cost = forward_flops(MODELS[cfg.model["name"]], **cfg.arguments("model"))
    model = loaded_model(word, cfg, run, device)
    text, context = model.text_decoder(ids, positions=positions), model.image_context(batch.images)
    decoder = partial(decode, model.multimodal_decoder, text, context, positions)
    for what, act, flops in (
        ("encode_image", partial(model.encode_image, batch.images), cost.vision + cost.poolers),
        ("encode_text", partial(model.encode_text, ids, positions=positions), cost.text),
        ("decoder, logits", decoder, cost.multimodal + cost.head),
        ("forward, logits", partial(model, batch.images, ids, positions=positions), cost.total),
    ):
        yield {
            "what": what,
            "variant": word,
            "tokens": ids.shape[1],
            "samples": b,
            **measure(act, device, **rounds(run))._asdict(),
            **limit(b * flops, "flops", rates.flops_per_second[word]),
        }


def decode(decoder: MultimodalDecoder, text: Tensor, context: Tensor, positions: Tensor) -> Tensor:
    return decoder.head(decoder(text, context, positions=positions))


def captions(cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """Captions of one image and of many, by greedy and by beam search, all of written_tokens tokens.

    The first row is greedy search without the cache, and says whether it writes the same captions.
    """
    for word in precisions(run):
        yield from until_out_of_memory("captions", word, captions_of(word, cfg, run, device, rates))


@torch.no_grad()
def captions_of(word: str, cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """The rows of one precision. The model is freed when they end."""
    size, n = cfg.model["image_size"], run.written_tokens
    tokenizer = cast(Tokenizer, NumberTokenizer(cfg.model["vocab_size"], cfg.model["context_length"]))
    model = loaded_model(word, cfg, run, device)

    def row(act: Callable[[], object], variant: str, count: int, num_beams: int) -> Row:
        return {
            "what": "captions",
            "variant": variant,
            "tokens": n,
            "samples": count,
            "num_beams": num_beams,
            **measure(act, device, **rounds(run))._asdict(),
            **limit(n * decoding_bytes(model), "bytes", rates.bytes_per_second),
        }

    for count, num_beams in product(run.images, run.num_beams):
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
        cached = partial(generate, model, images, tokenizer, max_new_tokens=n, min_new_tokens=n, num_beams=num_beams)
        if (word, count, num_beams) == (precisions(run)[0], run.images[0], 1):
            again = partial(without_cache, model, images, tokenizer, n)
            yield {**row(again, f"{word} without cache", count, num_beams), "same_captions": again() == cached()}
        yield row(cached, word, count, num_beams)


def without_cache(model: CoCa, images: Tensor, tokenizer: Tokenizer, tokens: int) -> list[str]:
    """Greedy search without cached keys and values; the image is encoded once."""
    context = model.image_context(images)
    ids = torch.full((len(images), 1), tokenizer.bos_id, device=images.device)
    never = [tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.cls_id]
    for _ in range(tokens):
        text = model.text_decoder(ids, positions=torch.arange(ids.shape[1], device=ids.device))
        scores = model.multimodal_decoder.head(model.multimodal_decoder(text, context)[:, -1]).float()
        scores[:, never] = -torch.inf
        ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), dim=1)
    return [tokenizer.decode(row) for row in ids[:, 1:].tolist()]


def loaded_model(word: str, cfg: config.Config, run: Run, device: torch.device) -> CoCa:
    """A model in one precision for inference, with random weights."""
    with torch.device("meta"):
        model: CoCa = cfg.build("model")
    initialize(model.to(DTYPES[word]), device, seed=run.seed)
    return model.eval()


def some_batches(
    cfg: config.Config,
    run: Run,
    count: int,
    device: torch.device,
    caption_tokens: int | None = None,
    text_multiple: int = 1,
) -> list[Batch]:
    """Random micro-batches that fit the model."""
    sizes = {key: cfg.model[key] for key in ("vocab_size", "context_length", "image_size")}
    batches = random_batches(
        count,
        batch_size=run.micro_batch_size,
        caption_tokens=caption_tokens,
        text_multiple=text_multiple,
        seed=run.seed,
        **sizes,
    )
    return [batch.to(device) for batch in batches]


def lengths(batches: list[Batch], caption_tokens: int | None) -> Row:
    """The columns of the texts that a step reads, padding included, and the mean length of the captions as asked."""
    return {"tokens": max(batch.ids.shape[1] for batch in batches), "caption_tokens": caption_tokens}


def limit(amount: int, unit: Literal["flops", "bytes"], rate: float) -> Row:
    """The work of a row, and the seconds that it takes at the machine's rate."""
    return {"amount": amount, "unit": unit, "limit_seconds": amount / rate}


def rounds(run: Run) -> dict[str, int]:
    return {"warmup": run.warmup, "iterations": run.iterations}


def precisions(run: Run) -> list[str]:
    return list(dict.fromkeys(map(precision, run.variants)))


def precision(variant: str) -> str:
    return variant.split()[0]


# --- output --------------------------------------------------------------------------------------------------------


def headline(result: dict[str, Any]) -> str:
    machine, rates = result["machine"], result["rates"]
    products = (f"{word} {rate / GIGA:,.0f} GFLOP/s" for word, rate in rates["flops_per_second"].items())
    return "\n".join(
        [
            f"{result['model']['name']}, {result['parameters']:,} parameters",
            f"{processor(machine)}, {machine['threads']} threads, torch {machine['torch']}",
            f"at best {', '.join(products)}; reads {rates['bytes_per_second'] / GIGA:,.1f} GB/s\n",
        ]
    )


def count_line(row: Row) -> str:
    """The counts of a step as a line."""
    if "out_of_memory" in row:
        return f"counts           {row['variant']}: out of memory"
    waits, kept = sum(row["waits"].values()), row["kept_bytes"] / row["samples"] / 1e6
    shares = row["flops"] / row["needed_flops"], row["unaligned_flops"] / row["flops"]
    return COUNTS.format(row["variant"], length(row), row["operations"], waits, row["host_calls"], kept, *shares)


def length(row: Row) -> str:
    """The lengths of the captions of a step: as asked, and as read."""
    asked = "full length" if row["caption_tokens"] is None else f"{row['caption_tokens']} tokens"
    return f"{asked} padded to {row['tokens']}"


def with_ratios(row: Row, earlier: list[Row]) -> Row:
    """Add to a row its rates, and its ratios to the first earlier row of the same kind."""
    if "out_of_memory" in row:
        return row
    alike = (other for other in earlier if other["what"] == row["what"] and "out_of_memory" not in other)
    first = next(alike, row)
    row["samples_per_second"] = row["samples"] / row["seconds"]
    row[f"{row['unit']}_per_second"] = row["amount"] / row["seconds"]
    row["utilisation"] = row["limit_seconds"] / row["seconds"]
    row["faster"] = row["samples_per_second"] / first["samples_per_second"]
    row["memory"] = row["peak_bytes"] / first["peak_bytes"] if row["peak_bytes"] else None
    return row


def as_line(row: Row) -> str:
    """A row as a line of the table."""
    if "out_of_memory" in row:
        return f"{row['what']:<17}{row['variant']}: out of memory"
    tokens = length(row) if "caption_tokens" in row else f"{row['tokens']} tokens"
    words = [row["variant"], tokens, f"{row['samples']} at a time"]
    words += [f"{row['num_beams']} beams"] if row.get("num_beams", 1) > 1 else []
    peak, memory = (f"{row['peak_bytes'] / GIGA:.2f}", f"{row['memory']:.2f}") if row["peak_bytes"] else ("-", "-")
    return TABLE.format(
        row["what"],
        ", ".join(words),
        f"{row['seconds']:.4g}",
        f"{row['samples_per_second']:.4g}",
        f"{row['amount'] / row['seconds'] / GIGA:,.1f}",
        f"{row['utilisation']:.1%}",
        peak,
        f"{row['faster']:.2f}",
        memory,
    )


if __name__ == "__main__":
    run_main(main)
