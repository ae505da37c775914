"""Turn a trained model into smaller ones: in bfloat16, int8, float8 or int4, with what each costs in quality and time.

    python recipes/quantize.py --config recipes/configs/quantize/openmoji.yaml

Every variant is a folder that opens as every model does, `load_pretrained("runs/openmoji/quantized/int8_dynamic")`, and
is measured as it opens there: bytes on disk, seconds an image embedded and a caption written, retrieval and captions on
data it never saw. Variants take turns while time is taken, so that what slows the machine slows all of them; compare
rows of one run. All numbers are in quantization.json.
"""

import contextlib
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from grr import config
from grr.checkpoint import save_model, save_model_state
from grr.data import DATASETS, Pairs
from grr.distributed import start
from grr.evaluate import captioning, recalls
from grr.generate import generate
from grr.images import BadImage
from grr.observe import observe
from grr.pretrained import LoadedModel, Pretrained, describe, find_pretrained, load_pretrained
from grr.quantize import check_scheme, quantize, quantized_state
from grr.table import aligned

Variant = Literal["fp32", "bf16", "int8_weight_only", "int8_dynamic", "float8_weight_only", "int4_weight_only"]
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}  # variants that are not quantised
DEFAULT: list[Variant] = ["fp32", "bf16", "int8_weight_only", "int8_dynamic", "float8_weight_only"]


@dataclass
class Run:
    """The recipe's own knobs."""

    folder: str  # a folder for each variant, and quantization.json
    variants: list[Variant] = field(default_factory=lambda: list(DEFAULT))  # ratios are to the first
    bf16: bool = False  # what a quantised variant does not quantise is kept, and all is computed, in bfloat16
    images: int | None = 500  # that quality is judged by, with their captions, the first so many; null: all
    batch_size: int = 32  # images embedded, and captioned, at a time when time is taken
    warmup: int = 2
    iterations: int = 7  # of which the median counts


@dataclass
class Model:
    """The model to start from."""

    path: str  # a run's folder, its model/, or one of its checkpoints/step_N


def main() -> None:
    cfg = config.load(run=Run, model=Model, data=DATASETS, generation=generate)
    run = Run(**cfg.run)
    source = find_pretrained(cfg.model["path"])
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    device = start()
    check(run, source, device)
    pairs = cfg.build("data")

    # quality: each variant is written, opened again and judged
    rows: list[dict[str, Any]] = []
    models: list[LoadedModel] = []
    for variant in run.variants:
        folder, dtype = Path(run.folder) / variant, dtype_of(variant, run)
        write(source, variant, dtype, folder, device)
        opened = load_pretrained(folder, device=device, dtype=dtype)
        seen = observe(opened.model, pairs, opened.tokenizer, device, image_size=opened.image_size, crop=opened.crop,
                       images=run.images, generation=cfg.generation)  # fmt: skip
        size = (folder / "model.safetensors").stat().st_size
        rows.append({"variant": variant, "dtype": str(dtype).removeprefix("torch."), "bytes": size, **recalls(seen),
                     **captioning(seen, opened.tokenizer)})  # fmt: skip
        models.append(opened)
        logging.info(f"{folder}: judged by {len(seen.images)} images")

    # time
    images = some_images(models[0], pairs, run.batch_size).to(device)  # [b, 3, h, w]
    embed = [partial(m.model.encode_image, images) for m in models]
    caption = [partial(generate, m.model, images, m.tokenizer, **cfg.generation) for m in models]
    for what, acts in {"image_seconds": embed, "caption_seconds": caption}.items():
        for row, taken in zip(rows, seconds(acts, run, device), strict=True):
            row[what] = taken / len(images)

    result = {"machine": machine(device), "model": str(source.path), "data": cfg.data, "rows": rows}
    (Path(run.folder) / "quantization.json").write_text(json.dumps(result, indent=2) + "\n")
    print(headline(result))
    print(aligned(table(rows)))


def check(run: Run, source: Pretrained, device: torch.device) -> None:
    """Say at once what would fail later."""
    if dist.get_world_size() > 1:
        raise ValueError(f"quantize: one process does it, got {dist.get_world_size()}; start it without torchrun")
    if source.quantization is not None:
        raise ValueError(f"quantize: {source.path} is quantised already, by {source.quantization}; give the model it "
                         "was made from")  # fmt: skip
    for variant in run.variants:
        if variant not in PLAIN:
            check_scheme(variant, device, dtype_of(variant, run))


def dtype_of(variant: Variant, run: Run) -> torch.dtype:
    """What a variant computes in, and stores what it does not quantise in."""
    return PLAIN.get(variant, torch.bfloat16 if run.bf16 else torch.float32)


def write(source: Pretrained, variant: Variant, dtype: torch.dtype, folder: Path, device: torch.device) -> None:
    model = load_pretrained(source.path, device=device, dtype=dtype).model
    if variant in PLAIN:
        save_model(folder, model, describe(source.builder, source.arguments, source.crop), source.tokenizer)
        return
    quantize(model, variant)
    description = describe(source.builder, source.arguments, source.crop, variant)
    save_model_state(folder, quantized_state(model), description, source.tokenizer)


def some_images(opened: LoadedModel, pairs: Pairs, count: int) -> Tensor:
    """The first `count` of the data that can be read: uint8 [b, 3, h, w]."""
    pixels: list[Tensor] = []
    for i in range(len(pairs)):
        if len(pixels) == count:
            break
        with contextlib.suppress(BadImage):
            pixels.append(pairs.load(i, size=opened.image_size, crop=opened.crop))
    return torch.stack(pixels)


@torch.no_grad()
def seconds(acts: Sequence[Callable[[], object]], run: Run, device: torch.device) -> list[float]:
    """Seconds of one call of each, the median of run.iterations, in each of which all of them take their turn."""
    taken: list[list[float]] = [[] for _ in acts]
    for _ in range(run.warmup + run.iterations):
        for act, times in zip(acts, taken, strict=True):
            synchronize(device)
            before = time.perf_counter()
            act()
            synchronize(device)
            times.append(time.perf_counter() - before)
    return [statistics.median(times[run.warmup :]) for times in taken]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    return {"device": name, "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "torch": torch.__version__}  # fmt: skip


def headline(result: dict[str, Any]) -> str:
    m = result["machine"]
    return (f"{result['model']}, {result['rows'][0]['candidates']} images; {m['device']}, {m['capability']}, "
            f"{m['threads']} threads, torch {m['torch']}\n")  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each variant; what it takes also as a share of what the first variant takes."""
    lines = [["variant", "dtype", "MB", "of first", "ms/image", "of first", "ms/caption", "of first", "image->text R@1",
              "text->image R@1", "CIDEr", "exact"]]  # fmt: skip
    for row in rows:
        cost = {"bytes": 1e6, "image_seconds": 1e-3, "caption_seconds": 1e-3}
        shown = [word for key, unit in cost.items()
                 for word in (f"{row[key] / unit:.2f}", f"{row[key] / rows[0][key]:.2f}")]  # fmt: skip
        quality = [f"{row[key]:.1%}" for key in ("image_to_text_r1", "text_to_image_r1")]
        lines.append([row["variant"], row["dtype"], *shown, *quality, f"{row['cider']:.3f}", f"{row['exact']:.1%}"])
    return lines


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
