"""The recipes and configs train as the paper says: its values one by one, and its step computed again in plain torch.

A run here has one global batch, all of its data, so that its loss does not depend on the order of the pairs.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from programs import run
from run_lines import lines
from torch import Tensor, nn

from grr import config
from grr.checkpoint.model_folder import save_model
from grr.checkpoint.training_state import load_checkpoint
from grr.inference.pretrained import build_pretrained, describe, find_pretrained, load_pretrained
from grr.models.builders import grr_coca
from grr.models.coca import CoCa
from grr.tokenizers import Tokenizer, train_tokenizer
from grr.training.optim import adamw

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

# --- the values of the paper's configs: sections 3 to 3.3 and table 1 ------------------------------------------------

GEOMETRY = {
    "image_size": 288,
    "patch_size": 18,
    "dim": 768,
    "num_heads": 12,
    "vision_layers": 12,
    "text_layers": 12,
    "multimodal_layers": 12,
    "context_length": 64,
    "num_queries": 64,
    "vocab_size": 32_102,
    "vision_ffn_multiplier": None,
    "patch_dropout": 0.0,
    "text_ffn_multiplier": 4.0,
    "text_norm": "rmsnorm",
    "text_feed_forward": "geglu",
    "text_position": "rope",
    "qk_norm": False,
    "pooler_norm": False,
    "tied_embeddings": False,
    "temperature": 0.07,
    "learned_temperature": False,
    "logit_bias": 0.0,
}
GRR = {"vision_norm": "rmsnorm", "vision_feed_forward": "geglu", "vision_position": "rope"}
CLASSIC = {"vision_norm": "layernorm", "vision_feed_forward": "mlp", "vision_position": "sinusoidal"}
ADAMW = {
    "betas": (0.9, 0.999),
    "weight_decay": 0.001,
    "eps": 1e-8,
    "decay_all": True,
    "layer_decay": 1.0,
}
SHARED = {
    "run": {"batch_size": 48 * 4 * 4, "micro_batch_size": 48, "max_grad_norm": 1.0},
    "parallel": {"bf16": True, "float8": False},
    "loader": {"crop": "squash"},
}
PRETRAIN = {
    **SHARED,
    "run": {**SHARED["run"], "epochs": 21, "max_steps": None},
    "tokenizer": {"context_length": 64},
    "data": {"name": "webdataset", "split": "train", "validation_fraction": 0.05},
    "validation": {"name": "webdataset", "split": "validation", "validation_fraction": 0.05},
    "loss": {"contrastive_weight": 2.0, "captioning_weight": 1.0, "contrastive": "softmax", "negatives": "global"},
    "optimizer": {"lr": 1e-4, **ADAMW},
    "schedule": {"warmup_steps": 2000, "min_lr": 1e-6, "cycle_epochs": 1.0},
}
FINETUNE = {
    **SHARED,
    "run": {**SHARED["run"], "epochs": None, "ema_decay": 0.0, "wise_ft_alpha": 1.0},
    "model": {"dropout": 0.1},
    "tuning": {"frozen": (), "lora": ()},
    "loss": {"contrastive_weight": 1.0, "captioning_weight": 2.0, "contrastive": "softmax", "negatives": "global"},
    "optimizer": {"lr": 1e-5, **ADAMW},
    "schedule": {"warmup_steps": 0, "min_lr": 1e-7, "cycle_epochs": 1.0},
    "control": {"patience": 3, "regimes": 3, "factor": 100.0},
}
COCO = "coco/annotations/captions_{}2017.json"
PAPER = {
    "pretrain/cc12m_grr": {**PRETRAIN, "model": {"name": "grr_coca", "dropout": 0.15, **GEOMETRY, **GRR}},
    "pretrain/cc12m_baseline": {**PRETRAIN, "model": {"name": "baseline_coca", "dropout": 0.15, **GEOMETRY, **CLASSIC}},
    "finetune/mscoco": {
        **FINETUNE,
        "data": {"name": "coco", "annotations": COCO.format("train"), "images": "coco/train2017"},
        "validation": {"name": "coco", "annotations": COCO.format("val"), "images": "coco/val2017"},
    },
    "finetune/rocov2": {
        **FINETUNE,
        "data": {"name": "rocov2", "split": "train"},
        "validation": {"name": "rocov2", "split": "validation"},
    },
    "finetune/flickr30k": {
        **FINETUNE,
        "data": {"name": "karpathy", "split": "train"},
        "validation": {"name": "karpathy", "split": "validation"},
    },
}


@pytest.fixture
def sections_of(monkeypatch) -> Callable[[str], config.Sections]:
    """The sections of a recipe's config, by the recipe's name."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return lambda recipe: __import__(recipe).SECTIONS


@pytest.mark.parametrize("name", PAPER)
def test_a_config_of_the_paper_has_the_papers_values(name, sections_of):
    """Read as the recipe reads it, so a default that changes counts as a value that changes."""
    file = RECIPES / f"configs/{name}.yaml"
    cfg = vars(config.load(sections_of(name.split("/")[0]), ["--config", str(file)]))
    for section, values in PAPER[name].items():
        assert {key: cfg[section][key] for key in values} == values, section
    if name.startswith("pretrain/"):  # every argument of the model is a value of the paper
        assert cfg["model"] == PAPER[name]["model"]
    else:
        assert cfg["model"] == {"path": "runs/cc12m_grr", "dropout": 0.1}


# --- a run of each recipe, and its steps in plain torch --------------------------------------------------------------

SIZES = {
    "vocab_size": 64,
    "context_length": 16,
    "num_queries": 16,
    "image_size": 32,
    "patch_size": 8,
    "dim": 32,
    "num_heads": 2,
    "vision_layers": 1,
    "text_layers": 1,
    "multimodal_layers": 1,
}
STEPS, WARMUP, CYCLE, LR, MIN_LR, CLIP, DECAY = 6, 2, 3, 1e-2, 1e-4, 0.5, 0.1
WEIGHTS = {"pretrain": (3.0, 0.5), "finetune": (1.0, 2.0)}  # contrastive, captioning; neither is the default
WORDS = ["red", "green", "blue", "black", "white", "small", "large", "round"]


class Pictures(NamedTuple):
    """A folder of four images of noise, and what a model reads of them."""

    path: Path
    images: Tensor  # uint8 [4, 3, 32, 32]
    captions: list[str]


def pictures(path: Path, seed: int, *, distinct: bool = True) -> Pictures:
    path.mkdir()
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    captions = [" ".join(random.choice(WORDS, 2 + i)) for i in range(4)]
    if not distinct:
        images[:], captions = images[0], captions[:1] * 4
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(path / f"{i}.png")
    rows = [f"{i}.png,{caption}" for i, caption in enumerate(captions)]
    (path / "captions.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    return Pictures(path, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions)


class House(NamedTuple):
    """What the runs of this file start from."""

    folder: Path
    tokenizer: Tokenizer
    training: Pictures
    validation: Pictures
    same: Pictures  # four copies of one pair: every batch of it is the same batch
    model: Path  # untrained


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> House:
    folder = tmp_path_factory.mktemp("house")
    tokenizer = train_tokenizer([" ".join(WORDS)], folder / "words", vocab_size=SIZES["vocab_size"], context_length=16)
    sizes = {**SIZES, "vocab_size": tokenizer.vocab_size}
    torch.manual_seed(0)
    save_model(folder / "model", grr_coca(**sizes), describe("grr_coca", sizes, "squash"), folder / "words")
    return House(
        folder,
        tokenizer,
        pictures(folder / "training", 1),
        pictures(folder / "validation", 2),
        pictures(folder / "same", 3, distinct=False),
        folder / "model",
    )


def train(house: House, recipe: str, name: str, data: Pictures, *, dropout: float, lr: float, seed: int = 0) -> Path:
    """Run a recipe over `data` for STEPS steps, each a global batch of two micro-batches, and keep every checkpoint."""
    folder = house.folder / f"{recipe}-{name}"
    contrastive, captioning = WEIGHTS[recipe]
    cfg = {
        "run": {
            "folder": str(folder),
            "seed": seed,
            "batch_size": 4,
            "micro_batch_size": 2,
            "epochs": STEPS,
            "max_grad_norm": CLIP,
            "log_every": 1,
            "num_eval_images": 4,
        },
        "saving": {"every": 1, "keep": 100},
        "data": {"name": "folder", "path": str(data.path)},
        "validation": {"name": "folder", "path": str(house.validation.path)},
        "loader": {"workers": 0},
        "loss": {"contrastive_weight": contrastive, "captioning_weight": captioning},
        "optimizer": {"lr": lr, "weight_decay": DECAY},
        "schedule": {"warmup_steps": WARMUP, "min_lr": lr * MIN_LR / LR, "cycle_epochs": CYCLE},
    }
    if recipe == "pretrain":
        sizes = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "context_length")}
        cfg["model"] = {"name": "grr_coca", "dropout": dropout, **sizes}
        cfg["tokenizer"] = {"path": str(house.folder / "words"), "context_length": 16}
    else:
        cfg["model"] = {"path": str(house.model), "dropout": dropout}
        cfg["control"] = {"patience": 100}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(cfg))
    done = run([str(RECIPES / f"{recipe}.py"), "--config", str(file)])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module", params=["pretrain", "finetune"])
def recipe(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stepped(house, recipe) -> Path:
    """A run without dropout, at a rate that changes the weights."""
    return train(house, recipe, "stepped", house.training, dropout=0.0, lr=LR)


@pytest.fixture(scope="module")
def dropped(house, recipe) -> Path:
    """A run with dropout over the same batch at every step, at a rate so low that no weight changes."""
    return train(house, recipe, "dropped", house.same, dropout=0.3, lr=1e-12)


def paper_losses(model: CoCa, data: Pictures, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """GRR-CoCa, equations 1 and 2, of all pairs as one batch: contrastive, captioning."""
    ids = torch.tensor([tokenizer.encode(caption) for caption in data.captions])  # [b, context_length + 1]
    output = model(data.images, ids[:, :-1])
    logits = output.image_embeddings @ output.text_embeddings.T / 0.07  # [b, b]
    match = torch.arange(len(ids))
    contrastive = F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)
    labels = ids[:, 1:].clone()
    labels[(labels == tokenizer.pad_id) | (labels == tokenizer.bos_id) | (labels == tokenizer.cls_id)] = -100
    return contrastive, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def paper_lr(step: int, lr: float) -> float:
    """Of the optimizer step counted from 0: linear warm-up within the first cycle, then half a cosine a cycle."""

    def cosine(n: int) -> list[float]:
        low = lr * MIN_LR / LR
        return [low + (lr - low) * (1 + math.cos(math.pi * i / n)) / 2 for i in range(n)]

    warm_up = [lr * (i + 1) / WARMUP for i in range(WARMUP)]
    return [*warm_up, *cosine(CYCLE - WARMUP), *cosine(CYCLE), *cosine(CYCLE)][step]


def checkpoint(path: Path) -> tuple[CoCa, torch.optim.Optimizer]:
    """Model and optimizer as they were saved."""
    model = build_pretrained(find_pretrained(path))
    optimizer = adamw(model)
    load_checkpoint(path, model, optimizer)
    return model, optimizer


def norm_of(model: nn.Module) -> float:
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()


@pytest.mark.slow
def test_the_rate_of_every_step_is_that_of_the_schedule_and_is_the_optimizers(stepped):
    training = lines(stepped, "train")
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    expected = [paper_lr(step, LR) for step in range(STEPS)]
    assert [line["lr"] for line in training] == pytest.approx(expected, rel=1e-12)
    assert expected[0] == LR / 2
    assert expected[2] == expected[3] == LR > expected[4] > expected[5]  # the rest of a cycle, and a whole one
    _, optimizer = checkpoint(stepped / f"checkpoints/step_{STEPS}")
    (group,) = optimizer.param_groups
    assert group["lr"] == pytest.approx(expected[-1], rel=1e-6)
    assert (group["weight_decay"], group["betas"], group["eps"]) == (DECAY, (0.9, 0.999), 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_step_is_the_papers_losses_weighted_a_clipped_gradient_and_adamw(house, recipe, stepped, step):
    """Step by step from each checkpoint to the next, in one batch and without the library's step."""
    model, optimizer = checkpoint(stepped / f"checkpoints/step_{step}")
    wanted, _ = checkpoint(stepped / f"checkpoints/step_{step + 1}")
    wanted = {name: value.clone() for name, value in wanted.state_dict().items()}
    contrastive, captioning = paper_losses(model, house.training, house.tokenizer)
    loss = WEIGHTS[recipe][0] * contrastive + WEIGHTS[recipe][1] * captioning
    logged = lines(stepped, "train")[step]
    assert logged["contrastive_loss"] == pytest.approx(contrastive.item(), rel=1e-4)
    assert logged["captioning_loss"] == pytest.approx(captioning.item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)

    optimizer.zero_grad()
    loss.backward()
    norm = norm_of(model)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert norm > 1.5 * CLIP
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= CLIP / norm
    for group in optimizer.param_groups:
        group["lr"] = paper_lr(step, LR)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    change = math.sqrt(sum((value - before[name]).square().sum().item() for name, value in wanted.items()))
    apart = math.sqrt(sum((value - wanted[name]).square().sum().item() for name, value in model.state_dict().items()))
    assert apart < 0.01 * change


@pytest.mark.slow
def test_the_gradient_is_clipped_before_the_optimizer_reads_it(stepped):
    """The first moment of the first step is a tenth of the gradient that AdamW was given."""
    _, optimizer = checkpoint(stepped / "checkpoints/step_1")
    moments = torch.stack([state["exp_avg"].norm() for state in optimizer.state.values()])
    assert lines(stepped, "train")[0]["grad_norm"] > 1.5 * CLIP
    assert moments.norm().item() == pytest.approx(0.1 * CLIP, rel=1e-3)


@pytest.mark.slow
def test_dropout_is_another_at_every_step(dropped):
    losses = [line["captioning_loss"] for line in lines(dropped, "train")]
    assert len(losses) == STEPS
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["finetune"], indirect=True)
def test_dropout_depends_on_the_seed(house, recipe, dropped):
    """Of a fine-tuning, since its seed draws no weights; and a batch of equal pairs has no order."""
    other = train(house, recipe, "seed", house.same, dropout=0.3, lr=1e-12, seed=1)
    ours, theirs = ([line["captioning_loss"] for line in lines(folder, "train")] for folder in (dropped, other))
    assert all(abs(a - b) > 1e-6 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_validation_is_on_the_validation_data_without_dropout(house, recipe, dropped):
    """Computed again with the model that the run left; no step of the run changed it."""
    model = load_pretrained(dropped).model
    with torch.no_grad():
        contrastive, captioning = (x.item() for x in paper_losses(model, house.validation, house.tokenizer))
        of_training = paper_losses(model, house.same, house.tokenizer)[1].item()
    assert abs(captioning - of_training) > 1e-3
    validations = lines(dropped, "validation")
    assert len(validations) >= STEPS
    for line in validations:
        assert line["contrastive_loss"] == pytest.approx(contrastive, rel=1e-4)
        assert line["captioning_loss"] == pytest.approx(captioning, rel=1e-4)
        loss = WEIGHTS[recipe][0] * contrastive + WEIGHTS[recipe][1] * captioning
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["perplexity"] == pytest.approx(math.exp(captioning), rel=1e-3)


@pytest.mark.slow
def test_training_takes_dropout_up_again_behind_a_validation(house, dropped):
    """Every step of this run but the first follows a validation."""
    model = load_pretrained(dropped).model
    with torch.no_grad():
        captioning = paper_losses(model, house.same, house.tokenizer)[1].item()
    for line in lines(dropped, "train"):
        assert abs(line["captioning_loss"] - captioning) > 1e-4
