"""What each logger has of a run, read by the tool's own reader; tests that need it skip where the tool is absent."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

TOOLS = ("tensorboard", "wandb", "trackio", "mlflow")
TRACKIO_ROWS = """
import json
from trackio.api import Api
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([
    [run.name, run.config, SQLiteStorage.get_logs("grr", run.name, run_id=run.id)] for run in Api().runs("grr")
]))
"""


@dataclass
class Logged:
    """The values of each metric and the captions of each step, in the order in which the tool has them."""

    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # split/name
    captions: dict[int, list[str]] = field(default_factory=dict)  # of validations, those that are there twice too
    runs: int = 0
    config: str = ""

    def add(self, key: str, step: int, value: Any) -> None:
        if isinstance(value, int | float):
            self.metrics.setdefault(key, []).append((step, value))


def need(tool: str) -> None:
    if find_spec(tool) is None:
        pytest.skip(f'{tool} is not installed: pip install "grr-coca[{tool}]"')


def read(tool: str, folder: Path) -> Logged:
    need(tool)
    return {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}[tool](folder)


def _tensorboard(folder: Path) -> Logged:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=dict.fromkeys(("scalars", "tensors"), 0))
    events.Reload()
    logged = Logged(runs=1)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            logged.add(tag, event.step, event.value)
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            text = event.tensor_proto.string_val[0].decode()
            if "/pictures/" in tag:
                assert event.step in {image.step for image in events.Images(tag.removesuffix("/text_summary"))}
                logged.captions.setdefault(event.step, []).append(text.replace("  \n", "\n"))
            elif "config.yaml" in tag:
                logged.config = text
    return logged


def _wandb(folder: Path) -> Logged:
    logged, ids = Logged(), set()
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        words = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json"]
        out = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, stdin=subprocess.DEVNULL)
        for record in map(json.loads, filter(lambda text: text.startswith("{"), out.stdout.splitlines())):
            if record["type"] == "run":
                ids.add(record["run"]["run_id"])
                logged.config = json.dumps(record["run"]["config"])
            if record["type"] != "history":
                continue
            row = record["history"]["item"]
            for key, value in row.items():
                if key.endswith("/pictures.filenames"):
                    assert all((file.parent / "files" / name).is_file() for name in value)
                elif key.endswith("/pictures.captions") and key.startswith("validation"):
                    logged.captions.setdefault(row["step"], []).extend(value)
                elif "/" in key:
                    logged.add(key, row["step"], value)
            logged.add("_step", row["step"], row["_step"])
    logged.runs = len(ids)
    return logged


def _trackio(folder: Path) -> Logged:
    environment = os.environ | {"TRACKIO_DIR": str(folder / "trackio")}
    words = [sys.executable, "-c", TRACKIO_ROWS]
    out = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, env=environment)
    runs = json.loads(out.stdout.splitlines()[-1])
    logged = Logged(runs=len(runs), config=json.dumps([config for _, config, _ in runs]))
    for row in (row for _, _, rows in runs for row in rows):
        for key, value in row.items():
            if "/pictures/" in key and key.startswith("validation"):
                assert (folder / "trackio/media" / value["file_path"]).is_file()
                logged.captions.setdefault(row["step"], []).append(value["caption"])
            elif "/" in key:
                logged.add(key, row["step"], value)
    return logged


def _mlflow(folder: Path) -> Logged:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("grr").experiment_id])
    logged = Logged(runs=len(runs))
    for run in runs:
        logged.config += json.dumps(run.data.params)
        for key in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, key):
                logged.add(key, metric.step, metric.value)
        files = folder / "mlflow" / run.info.run_id / "artifacts"
        for file in sorted((files / "validation").glob("step_*/captions.json")):
            captions = json.loads(file.read_text())
            assert set(captions) == {image.name for image in file.parent.glob("*.png")}
            logged.captions[int(file.parent.name.removeprefix("step_"))] = list(captions.values())
        assert (files / "config.yaml").read_text() == (folder / "config.yaml").read_text()
    return logged
