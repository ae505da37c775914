"""Export a trained model as graphs for onnxruntime and torch.export.

    python recipes/export.py --config recipes/configs/export/openmoji.yaml
    python runs/openmoji/export/run_onnx.py photo.jpg "a red fox" "a bowl of soup"

Writes image, text and step as .onnx and .pt2 (`grr.export.onnx` documents inputs and outputs), config.json, the
vocabulary, and run_onnx.py, which embeds images and texts and generates captions with only numpy and onnxruntime. Each
graph is run with other numbers of images and tokens than it was traced with, and compared with the model.
"""

import io
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from grr import config  # before torch: grr sets how its threads wait

# isort: split
import torch

from grr.cli.program import run_main
from grr.export.onnx import EXAMPLE, description, export_program, graphs, largest_difference, onnx_outputs, save_onnx
from grr.files.atomic import write_atomic
from grr.inference.pretrained import find_pretrained, load_pretrained
from grr.reports.table import aligned

Format = Literal["onnx", "pt2"]
ALLOWED = 1e-3  # difference of a graph from the model by rounding, of logits of magnitude 10


@dataclass
class Run:
    """Options of the recipe."""

    folder: str  # for the graphs
    formats: list[Format] = field(default_factory=lambda: ["onnx", "pt2"])
    pixels: Literal["uint8", "float32"] = "uint8"  # input of the image graph: bytes, or normalised floats


@dataclass
class Model:
    """Trained model."""

    path: str  # a run's folder, its model/, one of its checkpoints/step_N, or hf-hub:owner/name


SECTIONS: config.Sections = {"run": Run, "model": Model}


def main() -> None:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    source = find_pretrained(cfg.model["path"])
    model, tokenizer, image_size, _ = load_pretrained(source)
    parts = graphs(model, image_size, tokenizer.context_length, pixels=run.pixels)

    # graphs: trace, write, then run from the files
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = [["file", "MB", "largest difference"]]
    for name, graph in parts.items():
        print(f"tracing {name}", file=sys.stderr, flush=True)
        program = export_program(graph)
        inputs = graph.example(batch=3, tokens=4)
        for suffix in run.formats:
            file = folder / f"{name}.{suffix}"
            print(f"writing {file} and comparing it with the model", file=sys.stderr, flush=True)
            if suffix == "onnx":
                save_onnx(graph, program, file)
                outputs = onnx_outputs(file, inputs)
            else:
                content = io.BytesIO()  # torch aborts the process if it writes to a full disk itself
                torch.export.save(program, content)
                file.write_bytes(content.getbuffer())
                outputs = torch.export.load(file).module()(*inputs.values())
            difference = largest_difference(graph, inputs, outputs)
            if not difference < ALLOWED:
                raise ValueError(
                    f"export: {file} must equal the model within {ALLOWED}, got a difference of {difference:.2g}"
                )
            size = sum(path.stat().st_size for path in folder.glob(f"{file.name}*"))  # includes a file of weights
            table.append([file.name, f"{size / 1e6:.2f}", f"{difference:.1e}"])

    # description and vocabulary
    write_atomic(folder / "config.json", json.dumps(description(source, tokenizer, run.pixels), indent=2) + "\n")
    shutil.copyfile(source.tokenizer, folder / "tokenizer.model")
    if "onnx" in run.formats:
        shutil.copyfile(EXAMPLE, folder / EXAMPLE.name)
    print(aligned(table))
    print(f"see {folder}")


if __name__ == "__main__":
    run_main(main)
