"""Quantize a trained model to bfloat16, int8, float8 or int4, and measure each.

    python recipes/quantize.py --config recipes/configs/quantize/openmoji.yaml
    python recipes/quantize.py --config recipes/configs/quantize/paper_size.yaml tokenizer.path=spiece.model

Every variant is a folder that opens like any model, `load_pretrained("runs/openmoji/quantized/int8_dynamic")`, and is
measured as it opens there: bytes on disk, seconds per embedded image and per caption, retrieval and captions on data
that it was not trained on. The variants are timed in turns, so that a slow minute slows all of them; compare rows of
one run. quantization.json holds all numbers. Size and speed alone need no trained model: set model.name to a builder
and run.images to 0. All variants are in memory while they are timed.
"""

import contextlib
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from grr import config  # before torch: grr sets how its threads wait

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor

from grr.checkpoint.model_folder import save_model, save_model_state
from grr.cli.program import run_main
from grr.data import DATASETS, Pairs
from grr.data.images import BadImage
from grr.evaluation.captions import treebank
from grr.evaluation.evaluate import caption_scores, recalls
from grr.evaluation.outputs import compute_outputs
from grr.evaluation.timing import describe_machine, processor, time_in_turns
from grr.files.atomic import write_atomic
from grr.generation.generate import generate
from grr.inference.captioner import Captioner
from grr.inference.pretrained import (
    Pretrained,
    build_pretrained,
    describe,
    find_pretrained,
    load_pretrained,
)
from grr.inference.quantization import check_scheme, quantize, quantized_state
from grr.models.builders import MODELS
from grr.models.coca import CoCa
from grr.parallel.initialize import initialize
from grr.parallel.process_group import process_group
from grr.reports.table import aligned
from grr.tokenizers import open_tokenizer

Variant = Literal[
    "fp32", "bf16", "int8_weight_only", "int8_dynamic", "float8_weight_only", "int4_grouped", "int4_weight_only"
]
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}  # variants that are not quantised
DEFAULT: list[Variant] = ["fp32", "bf16", "int8_weight_only", "int8_dynamic", "float8_weight_only", "int4_grouped"]


@dataclass
class Run:
    """Options of the recipe."""

    folder: str  # a folder for each variant, and quantization.json
    variants: list[Variant] = field(default_factory=lambda: list(DEFAULT))  # ratios are to the first
    bf16: bool = False  # quantised variants keep the rest, and compute, in bfloat16
    images: int | None = 500  # images that quality is measured on, the first of the data; null: all, 0: size and speed
    batch_size: int = 32  # images at a time in the timed calls
    warmup: int = 2
    iterations: int = 7  # timed calls, of which the median is reported


def pretrained(*, path: str) -> CoCa:
    """The model to start from: a run's folder, its model/, one of its checkpoints/step_N, or hf-hub:owner/name."""
    return build_pretrained(find_pretrained(path))


SECTIONS: config.Sections = {
    "run": Run,
    "model": {"pretrained": pretrained, **MODELS},
    "tokenizer": open_tokenizer,
    "data": DATASETS,
    "generation": generate,
}


def main() -> None:
    cfg = config.load(SECTIONS)
    validate_config(cfg)
    run, folder = cfg.get(Run), Path(cfg.run["folder"])
    source = find_pretrained(cfg.model["path"]) if cfg.model["name"] == "pretrained" else None
    with process_group() as device:
        check_variants(run, source, device)
        pairs = cfg.build("data")
        source = source or untrained(cfg, pairs, folder / "untrained")

        # size and quality: each variant is written, opened again and evaluated
        rows: list[dict[str, Any]] = []
        for variant in run.variants:
            logging.info(f"{variant}: writing, opening and evaluating it")
            write(source, variant, dtype_of(variant, run), folder / variant, device)
            size = (folder / variant / "model.safetensors").stat().st_size
            dtype = str(dtype_of(variant, run)).removeprefix("torch.")
            rows.append({"variant": variant, "dtype": dtype, "bytes": size})
            logging.info(f"{folder / variant}: {size / 1e6:,.0f} MB")
            if run.images != 0:
                rows[-1] |= evaluate(open_variant(variant, run, device), pairs, run, cfg.generation, device)

        # time
        models = [open_variant(variant, run, device) for variant in run.variants]
        images = some_images(models[0], pairs, run.batch_size).to(device)  # [b, 3, h, w]
        embed = [partial(m.model.encode_image, images) for m in models]
        caption = [partial(generate, m.model, images, m.tokenizer, **cfg.generation) for m in models]
        timed: dict[str, Sequence[Callable[[], object]]] = {"image_seconds": embed, "caption_seconds": caption}
        for what, acts in timed.items():
            with torch.no_grad():
                taken = time_in_turns(acts, device, rounds=run.warmup + run.iterations, progress=what.replace("_", " "))
            for row, times in zip(rows, taken, strict=True):
                row[what] = statistics.median(times[run.warmup :]) / len(images)

        parameters = sum(p.numel() for p in models[0].model.parameters())
        result = {
            "machine": describe_machine(device),
            "model": str(source),
            "parameters": parameters,
            "data": cfg.data,
            "generation": cfg.generation,
            "batch_size": len(images),
            "rows": rows,
        }
        write_atomic(folder / "quantization.json", json.dumps(result, indent=2) + "\n")
        print(headline(result))
        print(aligned(table(rows)))


def validate_config(cfg: config.Config) -> None:
    """Raises ValueError if a model without training is to be evaluated, ImportError without what metrics need."""
    if cfg.run["images"] == 0:
        return
    if cfg.model["name"] != "pretrained":
        raise ValueError(
            f"quantize: a model without training has no quality to measure, got run.images={cfg.run['images']}; "
            "set run.images=0, or model.name=pretrained and model.path"
        )
    treebank()


def check_variants(run: Run, source: Pretrained | None, device: torch.device) -> None:
    """Raises ValueError if a variant cannot be made of the model on this device."""
    if dist.get_world_size() > 1:
        raise ValueError(
            f"quantize: one process quantizes a model, got {dist.get_world_size()}; start it without torchrun"
        )
    if source is not None and source.quantization is not None:
        raise ValueError(
            f"quantize: {source} is quantised already, by {source.quantization}; give the model it was made from"
        )
    for variant in run.variants:
        if variant not in PLAIN:
            check_scheme(variant, device, dtype_of(variant, run))


def dtype_of(variant: Variant, run: Run) -> torch.dtype:
    """The dtype in which a variant computes, and stores what it does not quantize."""
    return PLAIN.get(variant, torch.bfloat16 if run.bf16 else torch.float32)


def untrained(cfg: config.Config, pairs: Pairs, folder: Path) -> Pretrained:
    """A model with random weights in a folder, for size and speed alone."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = open_tokenizer(pairs.captions, folder / "tokenizer", **cfg.tokenizer)
    cfg.model |= {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
    with torch.device("meta"):
        model = cfg.build("model")
    initialize(model, torch.device("cpu"), seed=0)
    description = describe(cfg.model["name"], cfg.arguments("model"), "squash")
    save_model(folder / "model", model, description, folder / "tokenizer")
    return find_pretrained(folder)


def write(source: Pretrained, variant: Variant, dtype: torch.dtype, folder: Path, device: torch.device) -> None:
    model = load_pretrained(source, device=device, dtype=dtype).model
    if variant == "fp32" or variant == "bf16":
        save_model(folder, model, describe(source.builder, source.arguments, source.crop), source.tokenizer)
        return
    quantize(model, variant)
    description = describe(source.builder, source.arguments, source.crop, variant)
    save_model_state(folder, quantized_state(model), description, source.tokenizer)


def open_variant(variant: Variant, run: Run, device: torch.device) -> Captioner:
    return load_pretrained(Path(run.folder) / variant, device=device, dtype=dtype_of(variant, run))


def evaluate(
    it: Captioner, pairs: Pairs, run: Run, generation: dict[str, Any], device: torch.device
) -> dict[str, float]:
    """Retrieval and caption metrics of a variant."""
    outputs = compute_outputs(
        it.model,
        pairs,
        it.tokenizer,
        device,
        image_size=it.image_size,
        crop=it.crop,
        images=run.images,
        generation=generation,
        progress=True,
    )
    assert outputs is not None  # there is one process, rank 0
    return {**recalls(outputs), **caption_scores(outputs, it.tokenizer)}


def some_images(it: Captioner, pairs: Pairs, count: int) -> Tensor:
    """The first `count` readable images: uint8 [b, 3, h, w]."""
    pixels: list[Tensor] = []
    for i in range(len(pairs)):
        if len(pixels) == count:
            break
        with contextlib.suppress(BadImage):
            pixels.append(pairs.load(i, size=it.image_size, crop=it.crop))
    return torch.stack(pixels)


def headline(result: dict[str, Any]) -> str:
    m = result["machine"]
    evaluated = (
        f", evaluated on {result['rows'][0]['num_eval_images']} images"
        if "num_eval_images" in result["rows"][0]
        else ""
    )
    return (
        f"{result['model']}, {result['parameters']:,} parameters{evaluated}; timed with {result['batch_size']} images "
        f"at a time on {processor(m)}, {m['threads']} threads, torch {m['torch']}\n"
    )


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each variant; size and times also as fractions of those of the first variant."""
    evaluated = "cider" in rows[0]
    header = ["variant", "dtype", "MB", "of first", "ms/image", "of first", "ms/caption", "of first"]
    lines = [header + ["image->text R@1", "text->image R@1", "CIDEr-D", "exact"] * evaluated]
    for row in rows:
        cost = {"bytes": 1e6, "image_seconds": 1e-3, "caption_seconds": 1e-3}
        shown = [
            word for key, unit in cost.items() for word in (f"{row[key] / unit:.2f}", f"{row[key] / rows[0][key]:.2f}")
        ]
        quality = [f"{row[key]:.1%}" for key in ("image_to_text_r1", "text_to_image_r1") if evaluated]
        quality += [f"{row['cider']:.3f}", f"{row['exact']:.1%}"] if evaluated else []
        lines.append([row["variant"], row["dtype"], *shown, *quality])
    return lines


if __name__ == "__main__":
    run_main(main)
