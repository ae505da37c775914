"""Measure time and memory of training steps, towers and captions.

    python recipes/benchmark.py --config recipes/configs/benchmark/grr_coca.yaml
    python recipes/benchmark.py --config recipes/configs/benchmark/tiny.yaml run.variants='[bf16, bf16 compile]'

One process, on images and captions made up in memory, so that nothing waits for data. Seconds are medians after a
warm-up. "faster" and "memory" are ratios to the first row of the same kind, so compare rows of one run; "of limit" is
the share of what this machine can do, measured in the same run: of its matrix products for training and towers, of
reading the weights once a token for captions. All numbers are in run.folder/benchmark.json, a row as soon as measured.
Where memory does not suffice, a row says so, and the next variant follows.
"""

import contextlib
import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from grr import config
from grr.cli.program import run_main
from grr.data import Batch
from grr.data.collate import IGNORE, collate_captions
from grr.evaluation.flops import Towers, forward_flops, training_flops
from grr.generation.generate import generate
from grr.models.builders import MODELS
from grr.models.coca import CoCa, MultimodalDecoder
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import start
from grr.parallel.shard import blocks
from grr.seeds import derive_seed
from grr.tokenizers import Tokenizer
from grr.tokenizers.sentencepiece import EOS, PAD, UNK
from grr.training.optim import adamw, clip_gradients
from grr.training.step import global_batch_step

Part = Literal["training", "towers", "captions"]
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
TABLE = "{:<17}{:<44}{:>9}{:>11}{:>10}{:>10}{:>9}{:>8}{:>8}"
Row = dict[str, Any]


class Rates(NamedTuple):
    """What this machine can do at best, as measured."""

    flops_per_second: dict[str, float]  # of matrix products in fp32 and bf16
    bytes_per_second: float  # of reading memory


@dataclass
class Run:
    """Options of the recipe."""

    folder: str = "runs/benchmark"  # benchmark.json and config.yaml
    seed: int = 0
    parts: list[Part] = field(default_factory=lambda: ["training", "towers", "captions"])
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
    device = start()
    folder.mkdir(parents=True, exist_ok=True)
    config.save(cfg, folder / "config.yaml")

    # the machine: what it can do at best
    rates = Rates({word: matmul_rate(run, device, DTYPES[word]) for word in precisions(run)}, read_rate(run, device))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cfg.build("model").parameters())
    result = {
        "machine": machine(device),
        "rates": rates._asdict(),
        "model": cfg.model,
        "parameters": parameters,
        "rows": [],
    }
    print(headline(result), flush=True)

    # the model: a row for each thing measured
    measure = {"training": training, "towers": towers, "captions": captions}
    for part in run.parts:
        for row in measure[part](cfg, run, device, rates):
            print(add(result, row), flush=True)
            (folder / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")


def validate_config(cfg: config.Config) -> None:
    """Say at once all that would fail later, as `grr check` does."""
    run, room = cfg.get(Run), cfg.model["context_length"] - 3  # the most tokens of a caption
    processes = os.environ.get("WORLD_SIZE", "1")
    micro, tokens = run.micro_batch_size, run.written_tokens
    wrong = []
    if processes != "1":
        wrong.append(f"one process is measured, got {processes}; start it without torchrun")
    if run.batch_size % micro:
        wrong.append(f"batch_size must be a multiple of micro_batch_size, got {run.batch_size} and {micro}")
    if not 1 <= tokens <= room:
        wrong.append(f"the model's context has room for captions of 1 to {room} tokens, got written_tokens={tokens}")
    if any(mean is not None and not 1 <= mean <= room for mean in run.caption_tokens):
        wrong.append(f"caption_tokens must be null or a mean from 1 to {room}, got {run.caption_tokens}")
    if wrong:
        raise ValueError("benchmark: " + "; ".join(wrong))


# --- the three parts -----------------------------------------------------------------------------------------------


def training(cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """Optimizer steps as recipes/pretrain.py takes them, of each variant, with long and with short captions."""
    for variant in run.variants:
        yield from while_memory_lasts("training step", variant, training_of(variant, cfg, run, device, rates))


def training_of(variant: Variant, cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """The rows of one variant; when they are done, nothing holds its model any more."""
    model = trained_model(variant, cfg, run, device)
    optimizer = adamw(model, **cfg.optimizer)
    for tokens in run.caption_tokens:
        batches = [b.to(device) for b in random_batches(run, tokens, **sizes(cfg))]
        act = partial(step, model, optimizer, batches, run, cfg.loss)
        flops = training_flops(add_flops(batch_flops(cfg, batch) for batch in batches))
        yield {
            "what": "training step",
            "variant": variant,
            "tokens": max(b.ids.shape[1] for b in batches),
            "caption_tokens": tokens,
            "samples": run.batch_size,
            **measured(act, run, device),
            **limit(flops, "flops", rates.flops_per_second[precision(variant)]),
        }


def trained_model(variant: Variant, cfg: config.Config, run: Run, device: torch.device) -> nn.Module:
    torch.compiler.reset()  # else blocks of an earlier variant count against the limit of compiled versions
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
    """A forward pass of each tower and of the whole, one micro-batch of the longest captions."""
    for word in precisions(run):
        yield from while_memory_lasts("towers", word, towers_of(word, cfg, run, device, rates))


@torch.no_grad()
def towers_of(word: str, cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """The rows of one precision; when they are done, nothing holds its model any more."""
    (batch,) = random_batches(run, None, **sizes(cfg), count=1)
    batch = batch.to(device)
    ids, positions, b = batch.ids, batch.positions, len(batch.ids)
    cost = forward_flops(MODELS[cfg.model["name"]], **arguments(cfg))
    model = loaded_model(word, cfg, run, device)
    text, context = model.text_decoder(ids, positions=positions), model.image_context(batch.images)
    for what, act, flops in (
        ("encode_image", partial(model.encode_image, batch.images), cost.vision + cost.poolers),
        ("encode_text", partial(model.encode_text, ids, positions=positions), cost.text),
        (
            "decoder, logits",
            partial(decode, model.multimodal_decoder, text, context, positions),
            cost.multimodal + cost.head,
        ),
        ("forward, logits", partial(model, batch.images, ids, positions=positions), cost.total),
    ):
        yield {
            "what": what,
            "variant": word,
            "tokens": ids.shape[1],
            "samples": b,
            **measured(act, run, device),
            **limit(b * flops, "flops", rates.flops_per_second[word]),
        }


def decode(decoder: MultimodalDecoder, text: Tensor, context: Tensor, positions: Tensor) -> Tensor:
    return decoder.head(decoder(text, context, positions=positions))


def captions(cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """Captions of one image and of many, by greedy and by beam search, all of written_tokens tokens.

    The first row is greedy search that reads every token again for each next one, and says whether it writes the same.
    """
    for word in precisions(run):
        yield from while_memory_lasts("captions", word, captions_of(word, cfg, run, device, rates))


@torch.no_grad()
def captions_of(word: str, cfg: config.Config, run: Run, device: torch.device, rates: Rates) -> Iterator[Row]:
    """The rows of one precision; when they are done, nothing holds its model any more."""
    size, n = cfg.model["image_size"], run.written_tokens
    tokenizer = cast(Tokenizer, Numbers(cfg.model["vocab_size"], cfg.model["context_length"]))
    model = loaded_model(word, cfg, run, device)

    def row(act: Callable[[], object], variant: str, count: int, num_beams: int) -> Row:
        return {
            "what": "captions",
            "variant": variant,
            "tokens": n,
            "samples": count,
            "num_beams": num_beams,
            **measured(act, run, device),
            **limit(n * token_bytes(model), "bytes", rates.bytes_per_second),
        }

    for count, num_beams in product(run.images, run.num_beams):
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
        cached = partial(generate, model, images, tokenizer, max_new_tokens=n, min_new_tokens=n, num_beams=num_beams)
        if (word, count, num_beams) == (precisions(run)[0], run.images[0], 1):
            again = partial(without_cache, model, images, tokenizer, n)
            yield {**row(again, f"{word} without cache", count, num_beams), "same_captions": again() == cached()}
        yield row(cached, word, count, num_beams)


def without_cache(model: CoCa, images: Tensor, tokenizer: Tokenizer, tokens: int) -> list[str]:
    """Greedy search as it is without keys and values to remember; the image is encoded once."""
    context = model.image_context(images)
    ids = torch.full((len(images), 1), tokenizer.bos_id, device=images.device)
    never = [tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.cls_id]
    for _ in range(tokens):
        text = model.text_decoder(ids, positions=torch.arange(ids.shape[1], device=ids.device))
        scores = model.multimodal_decoder.head(model.multimodal_decoder(text, context)[:, -1]).float()
        scores[:, never] = -torch.inf
        ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), dim=1)
    return [tokenizer.decode(row) for row in ids[:, 1:].tolist()]


def token_bytes(model: CoCa) -> int:
    """The weights that each token of a caption needs: both decoders, without what reads the image, and the head."""
    layers = [*blocks(model.text_decoder), model.multimodal_decoder]
    weights = [named for layer in layers for named in layer.named_parameters()]
    return sum(weight.nbytes for name, weight in weights if ".cross_attention.kv." not in f".{name}")


def loaded_model(word: str, cfg: config.Config, run: Run, device: torch.device) -> CoCa:
    """A model as grr.inference.pretrained.load_pretrained gives it, but with weights as they are before training."""
    with torch.device("meta"):
        model: CoCa = cfg.build("model")
    initialize(model.to(DTYPES[word]), device, seed=run.seed)
    return model.eval()


def while_memory_lasts(what: str, variant: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows of one variant; where memory does not suffice for the next, one that says so ends them."""
    try:
        yield from rows
        return
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):  # GPU; CPU
            raise
        why = str(error).splitlines()[0]
    gc.collect()  # what the error held, the model above all, is gone before the next one is built
    yield {"what": what, "variant": variant, "out_of_memory": why}


# --- images and captions -------------------------------------------------------------------------------------------


@dataclass
class Numbers:
    """A tokenizer of any size that needs no file: a word is an id, in digits."""

    vocab_size: int
    context_length: int
    pad_id, eos_id = PAD, EOS

    def __post_init__(self) -> None:
        self.bos_id, self.cls_id = self.vocab_size - 2, self.vocab_size - 1

    def encode(self, tokens: list[int]) -> list[int]:
        """Lay out a caption as grr.tokenizers.sentencepiece does: context_length + 1 ids."""
        padding = [PAD] * (self.context_length - 3 - len(tokens))
        return [self.bos_id, *tokens, EOS, *padding, self.cls_id, PAD]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def sizes(cfg: config.Config) -> dict[str, int]:
    return {key: cfg.model[key] for key in ("vocab_size", "context_length", "image_size")}


def random_batches(
    run: Run, tokens: int | None, *, vocab_size: int, context_length: int, image_size: int, count: int | None = None
) -> list[Batch]:
    """Micro-batches of noise, with captions of any words: as long as there is room for, or of Poisson lengths.

    A batch is as long as its longest caption, so with captions of 15 tokens on average it is not 15 tokens long.
    """
    generator = torch.Generator().manual_seed(run.seed)
    tokenizer, room, b = Numbers(vocab_size, context_length), context_length - 3, run.micro_batch_size
    count = run.batch_size // b if count is None else count
    mean = torch.full((b,), float(room if tokens is None else tokens))
    batches = []
    for _ in range(count):
        lengths = mean if tokens is None else torch.poisson(mean, generator).clamp(1, room)  # [b]
        words = torch.randint(UNK + 1, tokenizer.bos_id, (b, room), generator=generator)
        rows = [tokenizer.encode(row[: int(n)].tolist()) for row, n in zip(words, lengths, strict=True)]
        images = torch.randint(0, 256, (b, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
        batches.append(Batch(images, *collate_captions(rows), names=[""] * b, replaced=0))
    return batches


# --- costs and times -----------------------------------------------------------------------------------------------


def arguments(cfg: config.Config) -> dict[str, Any]:
    return {key: value for key, value in cfg.model.items() if key != "name"}


def batch_flops(cfg: config.Config, batch: Batch) -> Towers:
    """The cost of a forward pass on one micro-batch: no column that nothing is learned from, no token without label."""
    cost = partial(forward_flops, MODELS[cfg.model["name"]], **arguments(cfg))
    read, scored = cost(text_length=batch.ids.shape[1]), cost(text_length=batch.labels.shape[1])
    b, labelled = len(batch.ids), int((batch.labels != IGNORE).sum())
    return Towers(
        vision=b * read.vision,
        poolers=b * read.poolers,
        text=b * read.text,
        multimodal=b * scored.multimodal,
        head=labelled * cost(text_length=1).head,
    )


def add_flops(flops: Iterable[Towers]) -> Towers:
    return Towers(*map(sum, zip(*flops, strict=True)))


def limit(amount: int, unit: Literal["flops", "bytes"], rate: float) -> Row:
    """What a row has to do, and the seconds that it takes at the machine's rate."""
    return {"amount": amount, "unit": unit, "limit_seconds": amount / rate}


def measured(act: Callable[[], object], run: Run, device: torch.device) -> Row:
    """Seconds of one call, the median of run.iterations; peak memory, and the seconds of the warm-up.

    Memory is that of torch's allocator on a GPU, elsewhere that of the process; null where the system does not tell.
    """
    told = reset_peak_bytes(device)
    times = []
    for _ in range(run.warmup + run.iterations):
        synchronize(device)
        before = time.perf_counter()
        act()
        synchronize(device)
        times.append(time.perf_counter() - before)
    return {
        "seconds": statistics.median(times[run.warmup :]),
        "warmup_seconds": sum(times[: run.warmup]),
        "peak_bytes": peak_bytes(device) if told else None,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_bytes(device: torch.device) -> bool:
    gc.collect()  # the model measured before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again
        return True
    return False


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    mark = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert mark is not None
    return int(mark[1]) * 1024


def matmul_rate(run: Run, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, of random numbers: zeros can be faster."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / measured(partial(torch.mm, a, b), run, device)["seconds"]


def read_rate(run: Run, device: torch.device) -> float:
    """Bytes/s of reading memory once: the sum of a GiB, more than any cache holds."""
    x = torch.ones(2**28, device=device)
    return x.nbytes / measured(x.sum, run, device)["seconds"]


def precisions(run: Run) -> list[str]:
    return list(dict.fromkeys(map(precision, run.variants)))


def precision(variant: str) -> str:
    return variant.split()[0]


# --- what is written down ------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.+)", _text(Path("/proc/cpuinfo")))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def headline(result: dict[str, Any]) -> str:
    m, rates = result["machine"], result["rates"]
    processor = m["cpu"] if m["device"] == "CPU" else f"{m['device']}, {m['cpu']}"
    products = (f"{word} {rate / GIGA:,.0f} GFLOP/s" for word, rate in rates["flops_per_second"].items())
    return "\n".join(
        [
            f"{result['model']['name']}, {result['parameters']:,} parameters",
            f"{processor}, {m['threads']} threads, torch {m['torch']}",
            f"at best {', '.join(products)}; reads {rates['bytes_per_second'] / GIGA:,.1f} GB/s\n",
            TABLE.format("", "", "seconds", "samples/s", "G/s", "of limit", "peak GB", "faster", "memory"),
        ]
    )


def add(result: dict[str, Any], row: Row) -> str:
    """Complete a row by its ratios to the first of its kind, keep it, and give it as a line of the table."""
    if "out_of_memory" in row:
        result["rows"].append(row)
        return f"{row['what']:<17}{row['variant']}: out of memory"
    alike = (earlier for earlier in result["rows"] if earlier["what"] == row["what"])
    first = next((earlier for earlier in alike if "out_of_memory" not in earlier), row)
    row["samples_per_second"] = row["samples"] / row["seconds"]
    row[f"{row['unit']}_per_second"] = row["amount"] / row["seconds"]
    row["of_limit"] = row["limit_seconds"] / row["seconds"]
    row["faster"] = row["samples_per_second"] / first.get("samples_per_second", row["samples_per_second"])
    row["memory"] = row["peak_bytes"] / first["peak_bytes"] if row["peak_bytes"] else None
    result["rows"].append(row)
    words = [row["variant"], f"{row['tokens']} tokens", f"{row['samples']} at a time"]
    words += [f"{row['num_beams']} beams"] if row.get("num_beams", 1) > 1 else []
    peak, memory = (f"{row['peak_bytes'] / GIGA:.2f}", f"{row['memory']:.2f}") if row["peak_bytes"] else ("-", "-")
    return TABLE.format(
        row["what"],
        ", ".join(words),
        f"{row['seconds']:.4g}",
        f"{row['samples_per_second']:.4g}",
        f"{row['amount'] / row['seconds'] / GIGA:,.1f}",
        f"{row['of_limit']:.1%}",
        peak,
        f"{row['faster']:.2f}",
        memory,
    )


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


if __name__ == "__main__":
    run_main(main)
